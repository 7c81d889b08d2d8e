"""Linear layers on the CPU: products of one to many rows with weights that were packed once.

With few rows a product reads its weights at the memory's speed, with many it computes at the FMA units' speed. Weights
may be stored as float32, bfloat16, float16 or int8; rows and sums are float32.
"""

import torch

from zipserve.kernels.linear.cpu import linear_cpu, runs_on_cpu
from zipserve.kernels.linear.matrix import PackedMatrix, interleave, pack
from zipserve.kernels.linear.reference import linear_reference

__all__ = ["PackedMatrix", "interleave", "linear", "linear_reference", "pack", "runs_on_cpu"]


def linear(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """x W^T + bias.

    Args:
        x: floating [..., inputs].

    Returns:
        [..., outputs] in the dtype of `x`.

    Raises:
        ValueError: the last dimension is not matrix.inputs.
    """
    if x.shape[-1] != matrix.inputs:
        raise ValueError(f"rows of {x.shape[-1]} numbers for a matrix of {matrix.inputs} inputs")
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], matrix.outputs)
    compute = linear_cpu if runs_on_cpu() else linear_reference
    rows = x.reshape(-1, matrix.inputs).float()
    return compute(rows, matrix).to(x.dtype).view(*x.shape[:-1], matrix.outputs)
