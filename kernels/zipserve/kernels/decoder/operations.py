"""What a program may do. Buffers are known by name; each holds one row per token, float32 [rows, columns]."""

import enum
from dataclasses import dataclass
from typing import TypeAlias

import torch

from zipserve.kernels.linear import PackedMatrix


class Activation(enum.Enum):
    """Of a gated product."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, eq=False)
class Linear:
    """target = W source + bias, of the source as it is or normalized first."""

    matrix: PackedMatrix
    source: str
    target: str
    norm: torch.Tensor | None = None
    """float32 [inputs]: weights of an RMS norm of the source."""
    eps: float = 0.0
    """Of that norm."""
    adds: bool = False
    """target += instead of =."""
    gated: Activation | None = None
    """The outputs are pairs of gates and factors (zipserve.kernels.linear.interleave): target = act(gate) * factor."""

    @property
    def columns(self) -> int:
        """Of the target."""
        return self.matrix.outputs // 2 if self.gated else self.matrix.outputs


@dataclass(frozen=True, eq=False)
class Heads:
    """Prepares query and key heads in place, which stand at the begin of the target's rows, one after another."""

    target: str
    query_heads: int
    key_heads: int
    dim: int
    rope: int | None
    """Which rotary table; None: no rotary embedding. It turns the first columns of each head, its own width of them."""
    norm: torch.Tensor | None = None
    """float32 [dim]: weights of an RMS norm of each query head, before the rotation."""
    key_norm: torch.Tensor | None = None
    """float32 [dim]: of each key head."""
    eps: float = 0.0
    """Of these norms."""


@dataclass(frozen=True, eq=False)
class NormAdd:
    """target += RMS norm of source."""

    source: str
    target: str
    norm: torch.Tensor
    """float32 [columns]"""
    eps: float


@dataclass(frozen=True, eq=False)
class Attend:
    """target = attention of the source's rows, each of them the newest token of a sequence of its own."""

    source: str
    """Its rows hold query heads, key heads and value heads, one after another."""
    target: str
    """[rows, query heads x value_dim]"""
    layer: int
    """Its number: in the workspace's attentions, and in their blocks."""


Operation: TypeAlias = Linear | Heads | NormAdd | Attend
