"""Linear layers on our own kernel: the generic way to make any module fast on the CPU.

Each `nn.Linear` (and GPT-2's `Conv1D`) gives its weights to a packed copy and is replaced; the rest of the module stays
as transformers wrote it. Tied embeddings look their rows up in the packed head, so that the weights exist once.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zipserve.kernels.linear import PackedMatrix, linear, pack


class PackedLinear(nn.Module):
    """A linear layer over packed weights."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs], in the dtype of `x`."""
        return linear(x, self.matrix)


class PackedEmbedding(nn.Module):
    """An embedding whose weights are those of a packed head."""

    def __init__(self, matrix: PackedMatrix, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.scale, self.dtype = matrix, scale, dtype

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[..., tokens] -> [..., tokens, width]"""
        rows = self.matrix.rows(token_ids.flatten()) * self.scale
        return rows.view(*token_ids.shape, -1).to(self.dtype)


def pack_linears(module: Any, storage: torch.dtype) -> None:
    """Replaces all linear layers of `module`, which give up their weights.

    Args:
        storage: see zipserve.kernels.linear.pack.
    """
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    is_tied = isinstance(embedding, nn.Embedding) and embedding.weight is getattr(head, "weight", None)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                setattr(parent, name, PackedLinear(take(child, storage)))
    packed = module.get_output_embeddings()
    if is_tied and isinstance(packed, PackedLinear):
        module.set_input_embeddings(embedding_over(packed.matrix, embedding))


def take(layer: nn.Linear | Conv1D, storage: torch.dtype) -> PackedMatrix:
    """Packs a linear layer, and takes its weights away."""
    return pack(take_weight(layer), storage, layer.bias)


def take_weight(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """Weights of a linear layer, [outputs, inputs]. It does not hold them any more: they are not to exist twice."""
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return weight.T if isinstance(layer, Conv1D) else weight


def embedding_over(matrix: PackedMatrix, embedding: nn.Embedding) -> PackedEmbedding:
    """What `embedding` does, over the packed head that it is tied to; it gives up its own weights."""
    dtype = embedding.weight.dtype
    embedding.weight = nn.Parameter(embedding.weight.new_empty(0), requires_grad=False)
    scale: Any = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):  # transformers rounds it like the weights
        scale = scale.to(dtype)
    return PackedEmbedding(matrix, float(scale), dtype)
