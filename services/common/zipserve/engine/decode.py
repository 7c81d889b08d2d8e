"""Attention and KV of sequences that add one token each, all of them at once."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from zipserve.engine.attention import Scoring, Visibility, weights
from zipserve.engine.cache import KvCache
from zipserve.engine.sequence import Sequence


@dataclass(frozen=True)
class _Plan:
    """What the rows see under one visibility; the same for all layers that see alike."""

    slabs: torch.Tensor
    """[n]: sealed blocks of all rows, one after another."""
    owner: torch.Tensor
    """[n]: the row that each of them belongs to."""
    column: torch.Tensor
    """[n]: its place among its row's blocks."""
    columns: int
    """Most blocks of a row."""
    visible: torch.Tensor
    """bool [rows, 1, 1, columns * block_tokens + open tokens]: sealed blocks first, then the open block."""


class DecodeRows:
    """One new token for each of `sequences`, in one step.

    Sealed blocks of all rows are read and multiplied together, one small matrix each; only the scores, which are small,
    are laid out as a rectangle.
    """

    def __init__(self, sequences: SequenceOf[Sequence], cache: KvCache) -> None:
        size = cache.layout.block_tokens
        self.count = len(sequences)
        self._cache = cache
        self._sequences = sequences
        self._slots = _index([sequence.slot for sequence in sequences], cache)
        offsets = [sequence.length % size for sequence in sequences]
        self._offsets = _index(offsets, cache)
        self._open_tokens = max(offsets) + 1
        self._starting = _index([seq.slot for seq, offset in zip(sequences, offsets, strict=True) if not offset], cache)
        full = [seq for seq, offset in zip(sequences, offsets, strict=True) if offset == size - 1]
        self._full_slots = _index([sequence.slot for sequence in full], cache)
        self._full_slabs = _index([sequence.blocks[sequence.length // size] for sequence in full], cache)
        self._plans: dict[Visibility, _Plan] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Writes the new tokens, attends over sealed blocks and the open one, and seals the blocks that became full.

        Args: as Attender.attend; returns [rows, heads, value_dim].
        """
        open_keys, open_values = self._cache.open_keys[layer], self._cache.open_values[layer]
        if len(self._starting):
            open_keys[self._starting] = 0
            open_values[self._starting] = 0
        open_keys[self._slots, :, self._offsets] = key.transpose(0, 1)
        open_values[self._slots, :, self._offsets] = value.transpose(0, 1)
        heads = (key.shape[0], query.shape[0] // key.shape[0])
        # [rows, kv_heads, group, key_dim]
        grouped = torch.unflatten(query.transpose(0, 1) * scoring.scale, 1, heads)
        output = self._attend(layer, grouped, scoring)
        if len(self._full_slots):
            full_keys, full_values = open_keys[self._full_slots], open_values[self._full_slots]
            self._cache.codec.write_blocks(layer, self._full_slabs, full_keys, full_values)
        return output.flatten(1, 2)

    def _attend(self, layer: int, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        cache, size = self._cache, self._cache.layout.block_tokens
        plan = self._plan(scoring.visibility)
        open_keys = cache.open_keys[layer, :, :, : self._open_tokens].index_select(0, self._slots)
        open_values = cache.open_values[layer, :, :, : self._open_tokens].index_select(0, self._slots)
        scores = torch.matmul(query, open_keys.transpose(2, 3))  # [rows, kv_heads, group, open tokens]
        if not plan.columns:
            return torch.matmul(self._weights(scores, scoring, plan).to(open_values.dtype), open_values)
        keys, values = cache.codec.read_blocks(layer, plan.slabs)
        sealed = scores.new_zeros(*scores.shape[:3], plan.columns, size)
        sealed[plan.owner, :, :, plan.column] = torch.matmul(query[plan.owner], keys.transpose(2, 3))
        scores = torch.cat((sealed.flatten(3), scores), 3)
        probabilities = self._weights(scores, scoring, plan).to(values.dtype)
        border = plan.columns * size
        output = torch.matmul(probabilities[..., border:], open_values)
        of_sealed = torch.unflatten(probabilities[..., :border], 3, (plan.columns, size))
        of_blocks = of_sealed[plan.owner, :, :, plan.column]
        return output.index_add_(0, plan.owner, torch.matmul(of_blocks, values))

    @staticmethod
    def _weights(scores: torch.Tensor, scoring: Scoring, plan: _Plan) -> torch.Tensor:
        """`weights` for scores [rows, kv_heads, group, keys]: heads are one dimension there."""
        shape = scores.shape
        return weights(scores.flatten(1, 2)[:, :, None], scoring, plan.visible).view(shape)

    def _plan(self, visibility: Visibility) -> _Plan:
        plan = self._plans.get(visibility)
        if plan is None:
            plan = self._plans[visibility] = self._make_plan(visibility)
        return plan

    def _make_plan(self, visibility: Visibility) -> _Plan:
        cache, size = self._cache, self._cache.layout.block_tokens
        slabs: list[int] = []
        owner: list[int] = []
        column: list[int] = []
        first_blocks: list[int] = []
        for row, sequence in enumerate(self._sequences):
            sealed = sequence.length // size
            first = min(visibility.first(sequence.length) // size, sealed)
            first_blocks.append(first)
            slabs += sequence.blocks[first:sealed]
            owner += [row] * (sealed - first)
            column += range(sealed - first)
        columns = max(column, default=-1) + 1
        positions = _index([sequence.length for sequence in self._sequences], cache)[:, None]
        # Columns beyond a row's own blocks would stand at positions of its open block or later: kept out below.
        sealed_keys = _index(first_blocks, cache)[:, None] * size + torch.arange(columns * size, device=cache.device)
        open_start = positions - positions % size
        open_keys = open_start + torch.arange(self._open_tokens, device=cache.device)
        visible = torch.cat(
            (
                visibility.mask(positions, sealed_keys) & (sealed_keys < open_start),
                visibility.mask(positions, open_keys),
            ),
            1,
        )
        return _Plan(
            _index(slabs, cache), _index(owner, cache), _index(column, cache), columns, visible[:, None, None, :]
        )


def _index(numbers: list[int], cache: KvCache) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=cache.device)
