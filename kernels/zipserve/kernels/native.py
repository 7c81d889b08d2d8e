"""Builds and loads the CPU kernels: plain C behind a plain ABI, compiled once per source, compiler flags and CPU.

The shared object lies in `$XDG_CACHE_HOME/zipserve/kernels`. Where no C compiler exists, `load` returns None and every
op falls back to its reference.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-fopenmp", "-shared", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)


def cache_dir() -> Path:
    """Folder of everything that zipserve builds once and keeps."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zipserve"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library of all CPU kernels, or None where no C compiler exists.

    Raises:
        subprocess.CalledProcessError: the compiler refused our source.
    """
    folder = Path(__file__).parent
    kernels = library(sorted(folder.glob("*/*.c")), sorted(folder.glob("**/*.h")))
    if kernels is not None:
        for name in ("zs_gemm_scratch", "zs_decoder_scratch"):
            getattr(kernels, name).restype = ctypes.c_int64
    return kernels


def library(sources: Sequence[Path], headers: Sequence[Path] = ()) -> ctypes.CDLL | None:
    """C files as one library for this CPU, built unless that has been done; None where no C compiler exists.

    Raises:
        subprocess.CalledProcessError: the compiler refused the source.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    key = hashlib.sha256(" ".join((*FLAGS, compiler, _cpu())).encode())
    for part in [*sources, *headers]:
        key.update(part.read_bytes())
    built = cache_dir() / "kernels" / f"{key.hexdigest()[:24]}.so"
    if not built.exists():
        _build(compiler, sources, built)
    return ctypes.CDLL(str(built))


def _build(compiler: str, sources: Sequence[Path], wanted: Path) -> None:
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=wanted.parent, suffix=".so", delete=False) as target:
        built = Path(target.name)
    try:
        include = f"-I{Path(__file__).parent}"
        subprocess.run([compiler, *FLAGS, include, "-o", built, *sources, "-lm"], check=True, capture_output=True)
        built.rename(wanted)  # atomic: another process that builds the same sees all or nothing
    finally:
        built.unlink(missing_ok=True)


def _cpu() -> str:
    """What -march=native depends on: the CPU's feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
