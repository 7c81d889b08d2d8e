"""The one place where a Hugging Face module calls us: attention over whatever batch the device thread has in hand.

transformers dispatches attention by name through its AttentionInterface. We register one function, and no mask
function: then no mask is built, and everything that a mask would say (causality, windows, chunks, where a sequence
ends) is ours to do. What a layer wants is taken from the call, not from the config, because families pass other values
on some layers.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from zipserve.common.errors import InvalidRequestError
from zipserve.kernels.attention import DecodeStep

IMPLEMENTATION = "zipserve"


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees besides causality: all from `first(position)` up to its own position."""

    window: int | None = None
    """The newest `window` tokens, the query's own among them."""
    chunk: int | None = None
    """Tokens of the query's own chunk of `chunk` positions."""

    def first(self, position: int) -> int:
        """Lowest position that a query at `position` sees."""
        window = position - self.window + 1 if self.window is not None else 0
        chunk = position - position % self.chunk if self.chunk is not None else 0
        return max(0, window, chunk)


@dataclass(frozen=True)
class Scoring:
    """How one layer turns queries and keys into weights."""

    scale: float
    visibility: Visibility
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    sinks: torch.Tensor | None = None
    """[heads]: one more logit per head that takes part in the softmax and has no value."""


class Attender(Protocol):
    """What the device thread has in hand: a batch, or a recorder while a model is loaded."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Attention of one layer over the packed row.

        Args:
            query: [heads, tokens, key_dim]; rotary embedding, if any, is applied.
            key: [kv_heads, tokens, key_dim].
            value: [kv_heads, tokens, value_dim].

        Returns:
            [tokens, heads, value_dim]
        """

    def steps(self, visibilities: Sequence[Visibility]) -> tuple[list[DecodeStep], torch.Tensor | None] | None:
        """For a program that computes all layers: what they attend over under each visibility, and where the weights of
        the open blocks are wanted (zipserve.kernels.decoder.Attentions). None: they are to `attend`, one by one.
        """
        return None


class Zeros(Attender):
    """Answers zeros, for passes whose numbers do not matter."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See Attender."""
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[2])


# A family may drop unknown keyword arguments on the way down (stablelm does), so the batch cannot be one.
_in_hand = threading.local()


@contextmanager
def attending(attender: Attender) -> Iterator[None]:
    """Answers the attention calls of this thread with `attender`."""
    _in_hand.attender = attender
    try:
        yield
    finally:
        _in_hand.attender = None


def in_hand() -> Attender:
    """Who answers this thread's attention calls.

    Raises:
        RuntimeError: nobody.
    """
    attender: Attender | None = getattr(_in_hand, "attender", None)
    if attender is None:
        raise RuntimeError("the module was called outside of the engine")
    return attender


def _hook(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  None: no mask function is registered under our name
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Called by every attention layer: query [1, heads, tokens, key_dim] and so on; returns [1, tokens, heads, dim]."""
    return in_hand().attend(module.layer_idx, query[0], key[0], value[0], _scoring(module, query, options))[None], None


def _scoring(module: Any, query: torch.Tensor, options: dict[str, Any]) -> Scoring:
    if options.get("position_bias") is not None or options.get("is_causal") is False:
        raise InvalidRequestError("its attention adds position biases or is not causal, which zipserve does not do")
    chunk = None
    layer_types = getattr(module.config, "layer_types", None)
    # Llama 4 says this only in its mask.
    if layer_types is not None and layer_types[module.layer_idx] == "chunked_attention":
        chunk = module.config.attention_chunk_size
    scale = options.get("scaling")
    return Scoring(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        visibility=Visibility(options.get("sliding_window"), chunk),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )


AttentionInterface.register(IMPLEMENTATION, _hook)
