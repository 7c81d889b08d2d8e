"""A model that is ready to serve: the module, and what is known of it."""

from dataclasses import dataclass
from typing import Any

import torch

from zipserve.common.kv.layout import Layout


@dataclass(frozen=True)
class LoadedModel:
    """A module that attends through us, and what is known of it."""

    module: Any
    """A transformers PreTrainedModel in eval mode."""
    name: str
    revision: str
    dtype: str
    device: torch.device
    vocab_tokens: int
    context_tokens: int
    """Longest sequence, prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int

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
        return logits(self.module, token_ids, positions, rows)


def logits(module: Any, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See LoadedModel.logits; `module` must attend through us."""
    # Spares the head's product for the other rows; a few families cannot.
    some = {"logits_to_keep": rows} if module._supports_logits_to_keep() else {}  # noqa: SLF001  has no public name
    found: torch.Tensor = module(input_ids=token_ids, position_ids=positions, use_cache=False, **some).logits[0]
    return (found if some else found[rows]).float()
