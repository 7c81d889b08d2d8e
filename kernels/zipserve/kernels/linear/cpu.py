"""Calls the C kernel of linear layers."""

import ctypes
import weakref

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
        *((name, ctypes.c_void_p) for name in ("matrix", "x", "out", "packed", "scratch")),
        *((name, ctypes.c_int64) for name in ("rows", "threads")),
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


def linear_cpu(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """float32 [rows, inputs] -> [rows, outputs]; only where `runs_on_cpu`."""
    library = native.load()
    assert library is not None
    x = x.contiguous()
    rows, threads = len(x), torch.get_num_threads()
    out = torch.empty(rows, matrix.outputs)
    scratch = torch.empty(threads * library.zs_gemm_scratch(ctypes.c_int64(matrix.inputs), rows))
    packed = torch.empty(rows * matrix.inputs)
    structure = structure_of(matrix)
    library.zs_linear(
        ctypes.byref(
            _Linear(
                *(ctypes.addressof(structure), x.data_ptr(), out.data_ptr(), packed.data_ptr(), scratch.data_ptr()),
                *(rows, threads),
            )
        )
    )
    return out
