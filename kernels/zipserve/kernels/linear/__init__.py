"""Linear layers on the CPU: products of one to many rows with weights that were packed once.

With few rows a product reads its weights at the memory's speed, with many it computes at the FMA units' speed. Weights
may be stored as float32, bfloat16, float16 or int8; rows and sums are float32.
"""

from collections.abc import Sequence

import torch

from zipserve.kernels.linear.cpu import Call, runs_on_cpu
from zipserve.kernels.linear.matrix import PackedMatrix, interleave, pack
from zipserve.kernels.linear.reference import linear_reference

__all__ = ["PackedMatrix", "Products", "interleave", "linear", "linear_reference", "pack", "runs_on_cpu"]


class Products:
    """Products of the same rows with one matrix or several, computed together."""

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        """
        Raises:
            ValueError: they have different numbers of inputs.
        """
        self._inputs, *others = {matrix.inputs for matrix in matrices}
        if others:
            raise ValueError(f"matrices of {sorted((self._inputs, *others))} inputs")
        self._matrices = tuple(matrices)
        self._call = Call(self._matrices) if runs_on_cpu() else None

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x W^T + bias of each matrix.

        Args:
            x: floating [..., inputs].

        Returns:
            [..., outputs] each, in the dtype of `x`.

        Raises:
            ValueError: the last dimension is not the matrices' inputs.
        """
        if x.shape[-1] != self._inputs:
            raise ValueError(f"rows of {x.shape[-1]} numbers for a matrix of {self._inputs} inputs")
        if not x.numel():
            return [x.new_zeros(*x.shape[:-1], matrix.outputs) for matrix in self._matrices]
        if self._call is None:
            return [linear_reference(x.float(), matrix).to(x.dtype) for matrix in self._matrices]
        if x.dtype is torch.float32:
            return self._call.run(x)
        return [out.to(x.dtype) for out in self._call.run(x.float())]


def linear(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """The product with one matrix; see Products."""
    return Products([matrix])(x)[0]
