"""The probe rows of a chunk: which of its tokens decide the classes of which blocks."""

import torch

from zipserve.engine.attention import Scoring, Visibility
from zipserve.kernels.saliency import probe_scores
from zipserve.kernels.zipformat import probe_offsets


class Probes:
    """Probe rows among the new tokens start .. end - 1 of a sequence."""

    def __init__(self, start: int, end: int, block_tokens: int, device: torch.device) -> None:
        offsets = set(probe_offsets(block_tokens))
        first = start // block_tokens
        self._positions = [position for position in range(start, end) if position % block_tokens in offsets]
        self._block_tokens = block_tokens
        self._device = device
        self.rows = self._index([position - start for position in self._positions])
        """int64 [p]: which of the new tokens they are."""
        offset = first * block_tokens  # position of the first key
        self._own = self._index([position - offset for position in self._positions])
        self._block = self._index([position // block_tokens - first for position in self._positions])
        self._offset = offset
        self._starts = self._index(list(range(0, end - offset, block_tokens)))
        self._first: dict[Visibility, torch.Tensor] = {}

    def scores(self, query: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """What the probe rows pay to the tokens of their blocks, in the layer at hand.

        Args:
            query: [heads, tokens, key_dim] of all new tokens.
            keys: [kv_heads, n, key_dim] from the start of the block that the first new token lies in.
            lse: float32 [heads, p]: of the probe rows, from their attention.

        Returns:
            float32 [blocks, block_tokens], for every block that a new token lies in.
        """
        if not self._positions:
            return torch.zeros(len(self._starts), self._block_tokens, device=self._device)
        first = self._first.get(scoring.visibility)
        if first is None:
            first = self._index([scoring.visibility.first(position) - self._offset for position in self._positions])
            self._first[scoring.visibility] = first
        return probe_scores(
            query.index_select(1, self.rows),
            keys,
            self._own,
            first,
            self._block,
            self._starts,
            self._block_tokens,
            scoring.scale,
            scoring.softcap,
            scoring.sinks,
            lse,
        )

    def _index(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
