"""Attention and KV of sequences that add one token each, all of them at once."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from zipserve.engine.attention import Scoring, Visibility
from zipserve.engine.cache import KvCache
from zipserve.engine.codec import decoded
from zipserve.engine.sequence import Sequence
from zipserve.kernels.attention import DecodeStep, OpenBlocks, SealedBlocks
from zipserve.kernels.zipformat import probe_offsets


@dataclass(frozen=True)
class _Plan:
    """What the rows see under one visibility; the same for all layers that see alike. int32, except `slabs`."""

    slabs: torch.Tensor
    """int64 [n]: sealed blocks of all rows, one after another."""
    sink_slabs: torch.Tensor
    """int64 [n]: of each of them; -1 unless it is block 0."""
    table: torch.Tensor
    """[rows, columns]: the slabs of each row's blocks."""
    index: torch.Tensor
    """[rows, columns]: where in `slabs` they stand."""
    counts: torch.Tensor
    """[rows]"""
    starts: torch.Tensor
    """[rows]: position of the first token of column 0."""
    first: torch.Tensor
    """[rows]: lowest position that the row sees."""


class DecodeRows:
    """One new token for each of `sequences`, in one step."""

    def __init__(self, sequences: SequenceOf[Sequence], cache: KvCache) -> None:
        size = cache.layout.block_tokens
        self.count = len(sequences)
        self._cache = cache
        self._sequences = sequences
        slots, offsets = [seq.slot for seq in sequences], [seq.length % size for seq in sequences]
        self._slots = _index(slots, cache)
        self._open_slots = self._slots.int()
        self._open_counts = _index(offsets, cache).int() + 1
        starting = [slot for slot, offset in zip(slots, offsets, strict=True) if not offset]
        if starting:
            for part in (cache.open_keys, cache.open_values, cache.open_scores):
                part[:, starting] = 0
        full = [seq for seq, offset in zip(sequences, offsets, strict=True) if offset == size - 1]
        self.full = [row for row, offset in enumerate(offsets) if offset == size - 1]
        """Rows whose block becomes full."""
        self._full_slots = _index([seq.slot for seq in full], cache)
        self._full_slabs = _index([seq.blocks[seq.length // size] for seq in full], cache)
        self._full_sinks = _index([seq.sinks if seq.length < size else -1 for seq in full], cache)
        probes = set(probe_offsets(size)) if cache.codec.needs_scores else set()
        self._probing = _index([row for row, offset in enumerate(offsets) if offset in probes], cache)
        self._weights = None
        if len(self._probing):
            self._weights = torch.empty(cache.layout.layers, self.count, size, device=cache.device)
        self._row_sinks = _index([seq.sinks for seq in sequences], cache).int()
        self._is_direct = cache.codec.sealed() is not None
        self._plans: dict[Visibility, _Plan] = {}
        self._steps: dict[Visibility, DecodeStep] = {}
        self.refused: list[tuple[int, torch.Tensor]] = []
        """Layer and status of the blocks of `full` that a codec may have refused."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Writes the new tokens, and attends over sealed blocks and the open one.

        Args: as Attender.attend; returns [rows, heads, value_dim].
        """
        return (
            self._step(layer, scoring.visibility)
            .attend(
                layer if self._is_direct else 0,
                query.transpose(0, 1),
                (key.transpose(0, 1), value.transpose(0, 1)),
                scale=scoring.scale,
                softcap=scoring.softcap,
                sink_logits=scoring.sinks,
                weights=None if self._weights is None else self._weights[layer],
            )
            .to(query.dtype)
        )

    def steps(self, visibilities: SequenceOf[Visibility]) -> tuple[list[DecodeStep], torch.Tensor | None] | None:
        """See zipserve.engine.attention.Attender; None where blocks are decoded layer by layer."""
        if not self._is_direct or self._cache.device.type != "cpu":
            return None
        return [self._step(0, visibility) for visibility in visibilities], self._weights

    def seal(self) -> None:
        """After the last layer: notes what the probe rows paid, and seals the blocks that became full."""
        cache = self._cache
        if self._weights is not None:
            cache.open_scores[:, self._slots[self._probing]] += self._weights[:, self._probing]
        for layer in range(cache.layout.layers) if self.full else ():
            status = cache.codec.write_blocks(
                layer,
                self._full_slabs,
                self._full_sinks,
                cache.open_keys[layer, self._full_slots],
                cache.open_values[layer, self._full_slots],
                cache.open_scores[layer, self._full_slots],
            )
            if status is not None:
                self.refused.append((layer, status))

    def _step(self, layer: int, visibility: Visibility) -> DecodeStep:
        """Attention over the rows' blocks as they are, the same for all layers; or decoded, where the codec must."""
        step = self._steps.get(visibility)
        if step is not None:
            return step
        cache, plan = self._cache, self._plan(visibility)
        sealed, table, layers = cache.codec.sealed(), plan.table, slice(None)
        if sealed is None:
            sealed = decoded(cache.codec, layer, plan.slabs, plan.sink_slabs)
            table, layers = plan.index, slice(layer, None)
        blocks = SealedBlocks(sealed.form, sealed.data, table, plan.counts, plan.starts, sealed.sinks, self._row_sinks)
        opened = OpenBlocks(cache.open_keys[layers], cache.open_values[layers], self._open_slots, self._open_counts)
        step = DecodeStep(blocks, opened, plan.first)
        if self._is_direct:
            self._steps[visibility] = step
        return step

    def _plan(self, visibility: Visibility) -> _Plan:
        plan = self._plans.get(visibility)
        if plan is None:
            plan = self._plans[visibility] = self._make_plan(visibility)
        return plan

    def _make_plan(self, visibility: Visibility) -> _Plan:
        cache, size = self._cache, self._cache.layout.block_tokens
        firsts = [visibility.first(sequence.length) for sequence in self._sequences]
        spans = []
        for sequence, first in zip(self._sequences, firsts, strict=True):
            sealed = sequence.length // size
            spans.append((min(first // size, sealed), sealed))
        slabs: list[int] = []
        sink_slabs: list[int] = []
        columns = max(last - first for first, last in spans)
        table: list[list[int]] = []
        index: list[list[int]] = []
        for sequence, (first, last) in zip(self._sequences, spans, strict=True):
            padding = [0] * (columns - last + first)
            table.append(sequence.blocks[first:last] + padding)
            index.append([*range(len(slabs), len(slabs) + last - first), *padding])
            slabs += sequence.blocks[first:last]
            sink_slabs += sequence.sink_slabs(first, last)
        counts = [last - first for first, last in spans]
        starts = [first * size for first, _ in spans]
        return _Plan(
            *(_index(numbers, cache) for numbers in (slabs, sink_slabs)),
            *(torch.tensor(rows, dtype=torch.int32, device=cache.device) for rows in (table, index)),
            *(_index(numbers, cache).int() for numbers in (counts, starts, firsts)),
        )


def _index(numbers: list[int], cache: KvCache) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=cache.device)
