"""Attention in programs: how the layers of a model attend, and over what the rows of a step do."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zipserve.kernels.attention import DecodeStep
from zipserve.kernels.attention.cpu import Call


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """How one layer attends; see zipserve.kernels.attention.DecodeStep.attend."""

    step: int
    """Which of a step's DecodeSteps: layers that see the same positions have one in common."""
    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None


class _Layer(ctypes.Structure):
    _fields_ = (
        ("sink_logits", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("step", "pad")),
    )


class Layers:
    """How all layers of a model attend: the same in every step, so that C's view of it is laid out once."""

    def __init__(self, layers: Sequence[LayerAttention]) -> None:
        self.layers = tuple(layers)
        found = [how.sink_logits for how in layers]
        self._sinks = [None if sinks is None else sinks.float().contiguous() for sinks in found]
        self.structures = (_Layer * len(layers))(
            *(
                _Layer(None if sinks is None else sinks.data_ptr(), how.scale, how.softcap or 0.0, how.step, 0)
                for how, sinks in zip(layers, self._sinks, strict=True)
            )
        )

    def check(self, steps: int, heads: int) -> None:
        """
        Raises:
            ValueError: a layer names another DecodeStep than one of `steps`, or has sinks of other heads.
        """
        named = {how.step for how in self.layers}
        if not named <= set(range(steps)):
            raise ValueError(f"layers name steps {sorted(named)}, there are {steps}")
        if any(sinks is not None and sinks.shape != (heads,) for sinks in self._sinks):
            raise ValueError(f"sink logits must be [{heads}]")


@dataclass(frozen=True, eq=False)
class Attentions:
    """Attention of one step, in all layers."""

    layers: Layers
    steps: Sequence[DecodeStep]
    weights: torch.Tensor | None = None
    """Where to write the softmax weights of the open blocks, float32 [layers, rows, block_tokens]."""

    def calls(self, rows: torch.Tensor, attended: torch.Tensor) -> list[Call]:
        """What C takes of each DecodeStep.

        Args:
            rows: of query heads, key heads and value heads.
            attended: room for what they find.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        calls = []
        for step in self.steps:
            query, key, value = step.heads(rows)
            heads, dim = query.shape[1], value.shape[2]
            self.layers.check(len(self.steps), heads)
            if attended.shape[1] != heads * dim or not attended.is_contiguous():
                raise ValueError(f"attention gives {heads} x {dim} columns, not {attended.shape[1]}")
            shape = (len(self.layers.layers), len(rows), step.block_tokens)
            if self.weights is not None and (self.weights.shape != shape or not self.weights.is_contiguous()):
                raise ValueError(f"weights must be contiguous {[*shape]}, not {[*self.weights.shape]}")
            call = step.call_of(0, query)
            if call is None:
                raise ValueError("the C kernel cannot attend over these blocks")
            call.check_heads(query, (key, value))
            calls.append(call)
        return calls
