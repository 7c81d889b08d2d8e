"""Linear layers that are called with the same rows, one after another: projections of queries, keys and values, gates
and factors. Which they are is seen in a forward pass; then one call computes all of them.
"""

from typing import Any

import torch
from torch import nn

from zipserve.engine.attention import Zeros, attending
from zipserve.engine.model import LoadedModel
from zipserve.kernels.linear import PackedMatrix, Products


class Siblings:
    """Products of the same rows: the layer that is called first computes all, the others take theirs."""

    def __init__(self, matrices: list[PackedMatrix]) -> None:
        self._products = Products(matrices)
        self._x: torch.Tensor | None = None
        self._found: dict[int, torch.Tensor] = {}

    def take(self, part: int, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs] of one of the matrices."""
        if x is not self._x or part not in self._found:
            self._x, self._found = x, dict(enumerate(self._products(x)))
        found = self._found.pop(part)
        if not self._found:
            self._x = None  # its memory is free for what follows
        return found


def find_siblings(model: LoadedModel, kinds: tuple[type[nn.Module], ...]) -> list[list[nn.Module]]:
    """Groups of layers of these kinds that got the same tensor, unchanged, without another layer's call in between."""
    calls: list[tuple[nn.Module, torch.Tensor, int]] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls.append((layer, arguments[0], arguments[0]._version))  # noqa: SLF001  the only way to see it

    layers = [layer for layer in model.module.modules() if type(layer) in kinds]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    tokens = torch.arange(2, device=model.device)[None]
    try:
        with attending(Zeros()), torch.no_grad():  # tensors of inference mode have no versions
            model.logits(tokens, tokens, tokens[0])
    finally:
        for hook in hooks:
            hook.remove()
    return _grouped(calls)


def _grouped(calls: list[tuple[nn.Module, torch.Tensor, int]]) -> list[list[nn.Module]]:
    groups: list[list[nn.Module]] = []
    before: tuple[torch.Tensor | None, int] = None, 0
    for layer, x, version in calls:
        if x is before[0] and version == before[1]:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        before = x, version
    names = [layer for layer, _, _ in calls]
    return [group for group in groups if len(group) > 1 and all(names.count(layer) == 1 for layer in group)]
