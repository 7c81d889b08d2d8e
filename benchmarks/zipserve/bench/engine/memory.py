"""How much memory a loaded model takes, as a multiple of its weights: measured in a process of its own."""

import argparse
import json
import pathlib
import subprocess
import sys

from transformers.utils.logging import disable_progress_bar

from zipserve.bench.engine import contestants
from zipserve.common import log, models
from zipserve.common.errors import InternalError
from zipserve.engine.startup import Path, Weights


def resident_bytes(model: str, path: Path, weights: Weights) -> int:
    """By how much loading a model lets the resident memory of a fresh process grow.

    Args: see Variant.

    Raises:
        InternalError: the process failed.
    """
    command = [sys.executable, "-P", "-m", __name__, model, path, weights]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if result.returncode:
        raise InternalError(f"loading {model} ended with status {result.returncode}")
    return int(json.loads(result.stdout))


def _resident() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise InternalError("this system does not tell how much memory a process has")


def main() -> None:
    """Of the process of its own."""
    parser = argparse.ArgumentParser()
    for name in ("model", "path", "weights"):
        parser.add_argument(name)
    options = parser.parse_args()
    log.configure(level="error", style="console")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = models.resolve(options.model)
    before = _resident()
    loaded = contestants.load(files, options.path, options.weights)
    print(json.dumps(_resident() - before))
    del loaded


if __name__ == "__main__":
    main()
