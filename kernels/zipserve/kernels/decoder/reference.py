"""What a program does, in plain PyTorch."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

from zipserve.kernels.decoder.attentions import Attentions
from zipserve.kernels.decoder.operations import Activation, Attend, Heads, Linear, Operation
from zipserve.kernels.linear import linear_reference
from zipserve.kernels.linear.matrix import PANEL
from zipserve.kernels.norm import rms_norm_reference


def run_reference(
    operations: Sequence[Operation],
    buffers: Mapping[str, torch.Tensor],
    ropes: Sequence[tuple[torch.Tensor, torch.Tensor]],
    attentions: Attentions | None = None,
) -> None:
    """Runs `operations` in order.

    Args:
        buffers: float32 [rows, columns] each, changed in place.
        ropes: cosines and sines, float32 [rows, width] each.
        attentions: for operations that attend.
    """
    for op in operations:
        if isinstance(op, Linear):
            _linear(op, buffers)
        elif isinstance(op, Heads):
            _heads(op, buffers[op.target], ropes)
        elif isinstance(op, Attend):
            assert attentions is not None
            _attend(op, buffers, attentions)
        else:
            buffers[op.target] += _norm(buffers[op.source], op.norm, op.eps)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else rms_norm_reference(x, weight, eps)


def _linear(op: Linear, buffers: Mapping[str, torch.Tensor]) -> None:
    found = linear_reference(_norm(buffers[op.source], op.norm, op.eps), op.matrix)
    if op.gated:
        gate, up = torch.unflatten(found, 1, (-1, 2, PANEL)).unbind(2)
        act = F.silu(gate) if op.gated is Activation.SILU else F.gelu(gate, approximate="tanh")
        found = (act * up).flatten(1)
    target = buffers[op.target]
    target.copy_(target + found if op.adds else found)


def _heads(op: Heads, rows: torch.Tensor, ropes: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    count = op.query_heads + op.key_heads
    heads = torch.unflatten(rows[:, : count * op.dim], 1, (count, op.dim))  # a view
    heads[:, : op.query_heads] = _norm(heads[:, : op.query_heads], op.norm, op.eps)
    heads[:, op.query_heads :] = _norm(heads[:, op.query_heads :], op.key_norm, op.eps)
    if op.rope is not None:
        cos, sin = (table[:, None] for table in ropes[op.rope])
        turned = heads[..., : cos.shape[-1]]
        lower, upper = turned.chunk(2, -1)
        turned.copy_(turned * cos + torch.cat((-upper, lower), -1) * sin)


def _attend(op: Attend, buffers: Mapping[str, torch.Tensor], attentions: Attentions) -> None:
    how, weights = attentions.layers.layers[op.layer], attentions.weights
    step = attentions.steps[how.step]
    query, key, value = step.heads(buffers[op.source])
    output = step.attend(
        op.layer, query, (key, value), scale=how.scale, softcap=how.softcap, sink_logits=how.sink_logits,
        weights=None if weights is None else weights[op.layer],
    )  # fmt: skip
    buffers[op.target].copy_(output.flatten(1))
