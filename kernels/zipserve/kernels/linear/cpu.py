"""Calls the C kernel of linear layers: many calls a step, so that what stands here is kept short."""

import ctypes
import functools
import weakref
from collections.abc import Sequence

import torch

from zipserve.kernels import native
from zipserve.kernels.linear.matrix import STORAGES, PackedMatrix


class Matrix(ctypes.Structure):
    """struct Matrix of gemm.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_int32) for name in ("type", "pad")),
    )


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrices", "outs", "x", "packed", "scratch")),
        *((name, ctypes.c_int64) for name in ("rows", "count", "threads")),
    )


_structures: "weakref.WeakKeyDictionary[PackedMatrix, Matrix]" = weakref.WeakKeyDictionary()


def runs_on_cpu() -> bool:
    """Whether the kernel is there."""
    return native.load() is not None


def structure_of(matrix: PackedMatrix) -> Matrix:
    """What C reads; it lives as long as the matrix."""
    found = _structures.get(matrix)
    if found is None:
        scales, bias = (None if part is None else part.data_ptr() for part in (matrix.scales, matrix.bias))
        kind = STORAGES.index(matrix.panels.dtype)
        found = Matrix(matrix.panels.data_ptr(), scales, bias, matrix.inputs, matrix.outputs, kind, 0)
        _structures[matrix] = found
    return found


class Call:
    """What all products with the same matrices have in common: it is laid out once."""

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        """
        Args:
            matrices: with as many inputs each.
        """
        self._inputs = matrices[0].inputs
        self._outputs = [matrix.outputs for matrix in matrices]
        self._matrices = matrices  # alive as long as C may read them
        self._addresses = (ctypes.c_void_p * len(matrices))(*(ctypes.addressof(structure_of(m)) for m in matrices))
        self._pointers = ctypes.c_void_p * len(matrices)

    def run(self, x: torch.Tensor) -> list[torch.Tensor]:
        """float32 [..., inputs] -> [..., outputs] of each matrix; only where `runs_on_cpu`."""
        library = native.load()
        assert library is not None
        x = x.contiguous()
        before, threads = x.shape[:-1], torch.get_num_threads()
        rows = x.numel() // self._inputs
        outs = [x.new_empty((*before, outputs)) for outputs in self._outputs]
        scratch = torch.empty(rows * self._inputs + threads * _scratch(self._inputs, rows))
        address = scratch.data_ptr()
        pointers = self._pointers(*(out.data_ptr() for out in outs))
        of_rows = (x.data_ptr(), address, address + 4 * rows * self._inputs, rows)
        arguments = (ctypes.addressof(self._addresses), ctypes.addressof(pointers), *of_rows, len(outs), threads)
        library.zs_linear(ctypes.byref(_Linear(*arguments)))
        return outs


@functools.lru_cache(maxsize=1024)
def _scratch(inputs: int, rows: int) -> int:
    """Floats of each thread."""
    library = native.load()
    assert library is not None
    floats: int = library.zs_gemm_scratch(ctypes.c_int64(inputs), rows)
    return floats
