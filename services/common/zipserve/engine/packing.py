"""Linear layers on our own kernel: the generic way to make any module fast on the CPU.

Each `nn.Linear` (and GPT-2's `Conv1D`) gives its weights to a packed copy and is replaced; the rest of the module stays
as transformers wrote it. Tied embeddings look their rows up in the packed head, so that the weights exist once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import nn
from transformers.pytorch_utils import Conv1D

from zipserve.engine.siblings import Siblings
from zipserve.kernels.linear import PackedMatrix, interleave, pack

LINEARS = (nn.Linear, Conv1D)


class PackedLinear(nn.Module):
    """A linear layer over packed weights."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.join(Siblings([matrix]), 0)

    def join(self, siblings: Siblings, part: int) -> None:
        """Takes its products from those of several layers."""
        self._siblings, self._part = siblings, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs], in the dtype of `x`."""
        return self._siblings.take(self._part, x)

    __call__ = forward  # it has no hooks, and is called often


class PackedEmbedding(nn.Module):
    """An embedding whose weights are those of a packed head."""

    def __init__(self, matrix: PackedMatrix, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.scale, self.dtype = matrix, scale, dtype

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[..., tokens] -> [..., tokens, width]"""
        rows = self.matrix.rows(token_ids.flatten()) * self.scale
        return rows.view(*token_ids.shape, -1).to(self.dtype)


def pack_linears(module: Any, storage: torch.dtype, siblings: Sequence[Sequence[nn.Module]] = ()) -> None:
    """Replaces all linear layers of `module`, which give up their weights.

    Args:
        storage: see zipserve.kernels.linear.pack.
        siblings: layers that are called with the same rows, see zipserve.engine.siblings.
    """
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    is_tied = isinstance(embedding, nn.Embedding) and embedding.weight is getattr(head, "weight", None)
    replaced: dict[nn.Module, PackedLinear] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in LINEARS:
                replaced[child] = PackedLinear(take(child, storage))
                setattr(parent, name, replaced[child])
    for group in siblings:
        layers = [replaced[layer] for layer in group]
        shared = Siblings([layer.matrix for layer in layers])
        for part, layer in enumerate(layers):
            layer.join(shared, part)
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


def take_gates(layers: list[nn.Linear], storage: torch.dtype) -> PackedMatrix:
    """Gates and factors, interleaved."""
    biases = [bias_of(layer) for layer in layers]
    weights = [take_weight(layer) for layer in layers]
    if len(layers) == 1:
        weights, biases = list(weights[0].chunk(2)), list(biases[0].chunk(2))
    bias = interleave(biases[0][:, None], biases[1][:, None])[:, 0]
    return pack(interleave(weights[0], weights[1]), storage, bias if bias.any() else None)


def take_down(layer: nn.Linear, inputs: int, storage: torch.dtype) -> PackedMatrix:
    """With as many inputs as the interleaved matrix gives."""
    return pack(F.pad(take_weight(layer), (0, inputs - layer.in_features)), storage, layer.bias)


def bias_of(layer: nn.Linear) -> torch.Tensor:
    bias: torch.Tensor | None = layer.bias  # typeshed says that there always is one
    return torch.zeros(layer.out_features) if bias is None else bias.detach()


def embedding_over(matrix: PackedMatrix, embedding: nn.Embedding) -> PackedEmbedding:
    """What `embedding` does, over the packed head that it is tied to; it gives up its own weights."""
    dtype = embedding.weight.dtype
    embedding.weight = nn.Parameter(embedding.weight.new_empty(0), requires_grad=False)
    scale: Any = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):  # transformers rounds it like the weights
        scale = scale.to(dtype)
    return PackedEmbedding(matrix, float(scale), dtype)
