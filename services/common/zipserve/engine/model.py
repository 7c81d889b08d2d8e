"""A model that is ready to serve: the module, and what is known of it."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zipserve.common.kv.layout import Layout
from zipserve.engine.attention import Scoring


class Forward(Protocol):
    """A forward pass; see LoadedModel.logits."""

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model that attends through us, and what is known of it."""

    module: Any
    """A transformers PreTrainedModel in eval mode. Weights that were packed are not in it any more."""
    forward: Forward
    """How its steps are computed."""
    name: str
    revision: str
    dtype: str
    device: torch.device
    parameters: int
    """Each once, though it may be tied to several places."""
    vocab_tokens: int
    context_tokens: int
    """Longest sequence, prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    heads: int
    scorings: tuple[Scoring, ...]
    """Of each layer's attention."""

    def layout(self, codec: str = "raw", block_tokens: int = 128) -> Layout:
        """The bytes of this model's blocks."""
        return Layout(
            model=self.name,
            revision=self.revision,
            layers=self.layers,
            kv_heads=self.kv_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            codec=codec,
            block_tokens=block_tokens,
        )

    def logits(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """One forward pass; whoever attends must be set (`attending`).

        Args:
            token_ids: [1, tokens] int64.
            positions: [1, tokens] int64.
            rows: [n] int64: the tokens whose logits are wanted.

        Returns:
            [n, vocab] float32
        """
        return self.forward(token_ids, positions, rows)


@dataclass(frozen=True)
class ModuleForward:
    """Forward passes of a transformers module that attends through us."""

    module: Any

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # Spares the head's product for the other rows; a few families cannot.
        some = {"logits_to_keep": rows} if self.module._supports_logits_to_keep() else {}  # noqa: SLF001  not public
        output = self.module(input_ids=token_ids, position_ids=positions, use_cache=False, **some)
        found: torch.Tensor = output.logits[0]
        return (found if some else found[rows]).float()
