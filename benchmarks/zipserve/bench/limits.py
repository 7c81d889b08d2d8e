"""What this machine can do at most, measured: bytes read from memory and multiply-adds, per second.

Of several ways the best is taken, each in its best round, so that a share of a limit never looks better than it is.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from zipserve.kernels import native
from zipserve.kernels.memory import allocate

MEMORY_BYTES = 256 << 20
_MULTIPLY_ADD_ROUNDS = 1_000_000
_MATRIX = 2048


@dataclass(frozen=True)
class Limits:
    """Of as many threads as torch uses."""

    read_bytes_s: float
    """Bytes per second of a sum over memory that no cache holds."""
    flops_s: float
    """float32 operations per second; a multiply-add counts as two."""

    def best(self, other: "Limits") -> "Limits":
        """The higher one of each, of two measurements."""
        return Limits(max(self.read_bytes_s, other.read_bytes_s), max(self.flops_s, other.flops_s))

    @property
    def text(self) -> str:
        """For a person."""
        return f"read bandwidth {self.read_bytes_s / 1e9:.1f} GB/s, multiply-adds {self.flops_s / 1e9:.0f} GFLOP/s"


def measure(rounds: int) -> Limits:
    """Measures both, in `rounds` rounds."""
    threads = torch.get_num_threads()
    # On huge pages as weights are, without which address translation is the limit.
    memory = allocate(MEMORY_BYTES).view(torch.int64).fill_(1)
    matrix = torch.ones(_MATRIX, _MATRIX)
    reads: dict[Callable[[], object], int] = {memory.sum: MEMORY_BYTES}
    multiplies: dict[Callable[[], object], int] = {lambda: matrix @ matrix: 2 * _MATRIX**3}
    library = native.library([Path(__file__).with_name("limits.c")])
    if library is not None:
        run, read = library.multiply_add, library.read_memory
        run.argtypes, run.restype = (ctypes.c_int64, ctypes.c_int), ctypes.c_double
        read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int), ctypes.c_double
        library.multiply_add_flops.restype = ctypes.c_int64
        reads[lambda: read(memory.data_ptr(), MEMORY_BYTES, threads)] = MEMORY_BYTES
        flops = library.multiply_add_flops() * threads * _MULTIPLY_ADD_ROUNDS
        multiplies[lambda: run(_MULTIPLY_ADD_ROUNDS, threads)] = flops
    return Limits(_best(reads, rounds), _best(multiplies, rounds))


def _best(ways: dict[Callable[[], object], int], rounds: int) -> float:
    """Work per second of the fastest round of the fastest way."""
    rates = []
    for _ in range(rounds + 1):
        for way, work in ways.items():
            started = time.perf_counter()
            way()
            rates.append(work / (time.perf_counter() - started))
    return max(rates)
