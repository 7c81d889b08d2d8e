"""Generates the Python code of the protos: `*_pb2.py`, `*_pb2_grpc.py` and their `.pyi` stubs.

hatchling runs it as a build hook for wheels and editable installs, and `make protos` runs it as a script. The code lies
beside its `.proto` and is never committed. Nothing runs when every output is newer than every input, and a file that
would not change is left alone, so that a running process never sees a half-written module.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO_ROOT = "protos"
PROTO_PACKAGE = "zipserve/v1"
BENCHMARK_TEXTS = "benchmarks/data"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(root: Path) -> list[Path]:
    """Brings the code of every proto under `root` up to date; returns the files that it wrote or removed.

    Raises:
        RuntimeError: protoc refused a proto; the message is protoc's own.
    """
    package = root / PROTO_ROOT / PROTO_PACKAGE
    protos = sorted(package.glob("*.proto"))
    outputs = [package / f"{proto.stem}{suffix}" for proto in protos for suffix in SUFFIXES]
    orphans = sorted({path for suffix in SUFFIXES for path in package.glob(f"*{suffix}")} - set(outputs))
    for orphan in orphans:
        orphan.unlink()
    if not protos or _up_to_date([Path(__file__), *protos], outputs):
        return orphans
    return orphans + _compile(root / PROTO_ROOT, protos, outputs)


def _up_to_date(inputs: list[Path], outputs: list[Path]) -> bool:
    if not all(output.exists() for output in outputs):
        return False
    return min(output.stat().st_mtime_ns for output in outputs) > max(path.stat().st_mtime_ns for path in inputs)


def _compile(proto_root: Path, protos: list[Path], outputs: list[Path]) -> list[Path]:
    """Runs protoc into a folder of its own, then moves each changed file into place in one step."""
    # On the same file system as the outputs, or the move would not be atomic.
    with tempfile.TemporaryDirectory(prefix=".protoc-", dir=proto_root) as scratch:
        _protoc(proto_root, protos, Path(scratch))
        changed = []
        for output in outputs:
            fresh = Path(scratch) / output.relative_to(proto_root)
            fresh.touch()  # a proto without a service has no grpc stub: an empty one keeps the outputs countable
            if output.exists() and output.read_bytes() == fresh.read_bytes():
                output.touch()
                continue
            os.replace(fresh, output)
            changed.append(output)
        return changed


def _protoc(proto_root: Path, protos: list[Path], destination: Path) -> None:
    # In an isolated build the plugins are on PATH only; in a virtual environment that is not activated they are not.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    outputs = [f"--{kind}_out={destination}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    inputs = [str(proto.relative_to(proto_root)) for proto in protos]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={proto_root}", *outputs, *inputs]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"protoc exited with {result.returncode}:\n{result.stderr}")


class ProtoBuildHook(BuildHookInterface[Any]):
    """Called by hatchling before it collects the files of a wheel or writes an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))
        # Images are built without the benchmarks, and an editable install reads the texts where they lie.
        if version != "editable" and (Path(self.root) / BENCHMARK_TEXTS).is_dir():
            build_data["force_include"][BENCHMARK_TEXTS] = "zipserve/bench/data"


if __name__ == "__main__":
    try:
        changed = generate(Path(__file__).resolve().parent)
    except RuntimeError as error:
        sys.exit(str(error))
    for path in changed:
        print(path)
