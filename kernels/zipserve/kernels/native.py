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
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*/*.c"))
    key = hashlib.sha256(" ".join((*FLAGS, compiler, _cpu())).encode())
    for part in [*sources, *sorted(folder.glob("**/*.h"))]:
        key.update(part.read_bytes())
    library = cache_dir() / "kernels" / f"{key.hexdigest()[:24]}.so"
    if not library.exists():
        _build(compiler, sources, library)
    kernels = ctypes.CDLL(str(library))
    for name in ("zs_gemm_scratch", "zs_decoder_scratch"):
        getattr(kernels, name).restype = ctypes.c_int64
    return kernels


def _build(compiler: str, sources: list[Path], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as target:
        built = Path(target.name)
    try:
        include = f"-I{Path(__file__).parent}"
        subprocess.run([compiler, *FLAGS, include, "-o", built, *sources, "-lm"], check=True, capture_output=True)
        built.rename(library)  # atomic: another process that builds the same sees all or nothing
    finally:
        built.unlink(missing_ok=True)


def _cpu() -> str:
    """What -march=native depends on: the CPU's feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
