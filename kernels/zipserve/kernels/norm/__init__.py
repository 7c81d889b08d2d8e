"""RMS norms of rows in one call, where PyTorch takes half a dozen."""

import torch

from zipserve.kernels.norm.cpu import rms_norm_cpu, runs_on_cpu
from zipserve.kernels.norm.reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight.

    Args:
        x: floating [..., columns].
        weight: float32 [columns], contiguous.

    Returns:
        [..., columns] in the dtype of `x`; all of it is computed as float32.

    Raises:
        ValueError: the weights do not fit the rows.
    """
    if weight.shape != x.shape[-1:] or weight.dtype is not torch.float32 or not weight.is_contiguous():
        raise ValueError(f"weights {list(weight.shape)} of {weight.dtype} for rows of {x.shape[-1]} numbers")
    compute = rms_norm_cpu if runs_on_cpu(x) else rms_norm_reference
    if x.dtype is torch.float32:
        return compute(x, weight, eps)
    return compute(x.float(), weight, eps).to(x.dtype)
