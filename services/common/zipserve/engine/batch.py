"""The tokens of one step as one packed row: first the sequences that add one token, then the chunks of prompts."""

from collections.abc import Sequence as SequenceOf

import torch

from zipserve.common.errors import KvValueError
from zipserve.engine.attention import Attender, Scoring, Visibility
from zipserve.engine.cache import KvCache
from zipserve.engine.chunk import Chunk
from zipserve.engine.codec import REFUSALS
from zipserve.engine.decode import DecodeRows
from zipserve.engine.sequence import Segment
from zipserve.kernels.attention import DecodeStep


class Batch(Attender):
    """One step over `segments`, which must be valid. Writes the KV of its tokens as their layers are computed."""

    def __init__(self, segments: SequenceOf[Segment], cache: KvCache) -> None:
        order = sorted(range(len(segments)), key=lambda index: len(segments[index].token_ids) > 1)
        decode = [segments[index].sequence for index in order if len(segments[index].token_ids) == 1]
        self._decode = DecodeRows(decode, cache) if decode else None
        self._order = order
        self._layers = cache.layout.layers
        self._chunks: list[tuple[slice, Chunk]] = []
        self.calls = 0
        """Layers that have been computed."""
        spans = [slice(0)] * len(segments)
        token_ids: list[int] = []
        positions: list[int] = []
        for index in order:
            sequence, ids = segments[index].sequence, segments[index].token_ids
            rows = slice(len(token_ids), len(token_ids) + len(ids))
            if len(ids) > 1:
                self._chunks.append((rows, Chunk(sequence, len(ids), cache)))
            token_ids.extend(ids)
            positions.extend(range(sequence.length, sequence.length + len(ids)))
            spans[index] = rows
        self.token_ids = torch.tensor([token_ids], device=cache.device)
        """[1, tokens]"""
        self.positions = torch.tensor([positions], device=cache.device)
        """[1, tokens]"""
        self.last = torch.tensor([rows.stop - 1 for rows in spans], device=cache.device)
        """[segments]: row of each segment's last token."""
        self.every = {
            index: torch.arange(spans[index].start, spans[index].stop, device=cache.device)
            for index, segment in enumerate(segments)
            if segment.every_row
        }
        """[tokens]: all rows of the segments that want them, by index."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See zipserve.engine.attention.Attender."""
        self.calls += 1
        if self._decode is not None and not self._chunks:
            return self._decode.attend(layer, query, key, value, scoring)
        output = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        if self._decode is not None:
            rows = slice(0, self._decode.count)
            output[rows] = self._decode.attend(layer, query[:, rows], key[:, rows], value[:, rows], scoring)
        for rows, chunk in self._chunks:
            output[rows] = chunk.attend(layer, query[:, rows], key[:, rows], value[:, rows], scoring)
        return output

    def steps(self, visibilities: SequenceOf[Visibility]) -> tuple[list[DecodeStep], torch.Tensor | None] | None:
        """See zipserve.engine.attention.Attender. Who takes them computes all layers."""
        found = None if self._decode is None or self._chunks else self._decode.steps(visibilities)
        if found is not None:
            self.calls += self._layers
        return found

    def seal(self) -> None:
        """To be called after the last layer."""
        if self._decode is not None:
            self._decode.seal()

    def refused(self) -> dict[int, KvValueError]:
        """The segments with a block that the codec refused, by index; to be asked after `seal`."""
        found: dict[int, KvValueError] = {}
        if self._decode is not None:
            _note(self._decode.refused, [self._order[row] for row in self._decode.full], found)
        for index, (_, chunk) in zip(self._order[len(self._order) - len(self._chunks) :], self._chunks, strict=True):
            _note(chunk.refused, [index] * chunk.full_blocks, found)
        return found


def _note(refused: list[tuple[int, torch.Tensor]], segments: list[int], found: dict[int, KvValueError]) -> None:
    """Adds the first refusal of each segment; `refused` has layer and status of the blocks of `segments`."""
    if not refused or not bool(torch.stack([status for _, status in refused]).any()):
        return
    for layer, status in refused:
        for segment, code in zip(segments, status.tolist(), strict=True):
            if code:
                found.setdefault(segment, KvValueError(f"a block of layer {layer} cannot be sealed: {REFUSALS[code]}"))
