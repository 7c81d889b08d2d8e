"""Calls the C kernel of RMS norms."""

import ctypes

import torch

from zipserve.kernels import native


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "threads")),
        ("eps", ctypes.c_float),
    )


def runs_on_cpu(x: torch.Tensor) -> bool:
    """Whether `rms_norm_cpu` can do this: the rows are on the CPU, and the kernel is there."""
    return x.device.type == "cpu" and native.load() is not None


def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See zipserve.kernels.norm.rms_norm; only where `runs_on_cpu`."""
    library = native.load()
    assert library is not None
    x = x.contiguous()
    out, columns = torch.empty_like(x), x.shape[-1]
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    library.zs_rms_norm(ctypes.byref(_Norm(*pointers, x.numel() // columns, columns, torch.get_num_threads(), eps)))
    return out
