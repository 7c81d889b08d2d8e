"""The probe rows of a chunk: which of its tokens decide the classes of which blocks."""

import torch

from zipserve.engine.attention import Scoring, Visibility
from zipserve.kernels.saliency import probe_scores
from zipserve.kernels.zipformat import probe_offsets


class Probes:
    """Probe rows among the new tokens start .. end - 1 of a sequence."""

    def __init__(self, start: int, end: int, block_tokens: int, device: torch.device) -> None:
        offsets = set(probe_offsets(block_tokens))
        self._positions = [position for position in range(start, end) if position % block_tokens in offsets]
        self._block_tokens = block_tokens
        self._device = device
        first = start // block_tokens
        self._rows = self._index([position - start for position in self._positions])
        self._own = self._index(self._positions)
        self._block = self._index([position // block_tokens - first for position in self._positions])
        blocks = range(first, -(-end // block_tokens))
        self._starts = self._index([block * block_tokens for block in blocks])
        self._first: dict[Visibility, torch.Tensor] = {}

    def scores(self, query: torch.Tensor, keys: torch.Tensor, scoring: Scoring, offset: int) -> torch.Tensor:
        """What the probe rows pay to the tokens of their blocks, in the layer at hand.

        Args:
            query: [heads, tokens, key_dim] of all new tokens.
            keys: [kv_heads, n, key_dim] from position `offset`, the start of a block, up to the last new token.

        Returns:
            float32 [blocks, block_tokens], for every block that a new token lies in.
        """
        first = self._first.get(scoring.visibility)
        if first is None:
            first = self._index([scoring.visibility.first(position) for position in self._positions])
            self._first[scoring.visibility] = first
        return probe_scores(
            query.index_select(1, self._rows),
            keys,
            self._own - offset,
            first - offset,
            self._block,
            self._starts - offset,
            self._block_tokens,
            scoring.scale,
            scoring.softcap,
            scoring.sinks,
        )

    def _index(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
