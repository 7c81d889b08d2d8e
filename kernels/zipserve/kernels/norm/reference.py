"""What an RMS norm is."""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """float32 [..., columns] -> likewise; see zipserve.kernels.norm.rms_norm."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
