"""What a product with a packed matrix is."""

import torch

from zipserve.kernels.linear.matrix import PackedMatrix


def linear_reference(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """float32 [rows, inputs] -> [rows, outputs]; see zipserve.kernels.linear.linear."""
    bias = None if matrix.bias is None else matrix.bias[: matrix.outputs]
    return torch.nn.functional.linear(x, matrix.unpack(), bias)
