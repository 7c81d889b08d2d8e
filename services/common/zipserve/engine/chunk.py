"""Attention and KV of several new tokens of one sequence: a prompt, or a part of it."""

from dataclasses import dataclass

import torch

from zipserve.engine.attention import Scoring, Visibility
from zipserve.engine.cache import KvCache
from zipserve.engine.codec import decoded
from zipserve.engine.probes import Probes
from zipserve.engine.sequence import Sequence
from zipserve.kernels.prefill_attention import Prefix, prefill_attention


@dataclass(frozen=True)
class _Seen:
    """What the new tokens see under one visibility; the same for all layers that see alike."""

    past: slice
    """Sealed blocks that any of them sees."""
    first: torch.Tensor | None
    """int32 [tokens]: lowest position that each sees; None: everything."""


class Chunk:
    """`tokens` new tokens of a sequence, in one step."""

    def __init__(self, sequence: Sequence, tokens: int, cache: KvCache) -> None:
        self._cache = cache
        self._slot = sequence.slot
        self._start = sequence.length
        self._end = sequence.length + tokens
        size = cache.layout.block_tokens
        self._sealed, self._open = divmod(self._start, size)
        blocks = self._end // size
        self._slabs = torch.tensor(sequence.blocks[:blocks], dtype=torch.int64, device=cache.device)
        self._sink_slabs = torch.tensor(sequence.sink_slabs(0, blocks), dtype=torch.int64, device=cache.device)
        self._views: dict[Visibility, _Seen] = {}
        self._probes = Probes(self._start, self._end, size, cache.device) if cache.codec.needs_scores else None
        self.full_blocks = blocks - self._sealed
        """Blocks that become full."""
        self.refused: list[tuple[int, torch.Tensor]] = []
        """Layer and status of these blocks, where a codec may have refused one."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Attention over the sealed blocks, the open block and the new tokens, which are then written.

        Args: as Attender.attend; returns [tokens, heads, value_dim].
        """
        if self._open:
            key = torch.cat((self._cache.open_keys[layer, self._slot, :, : self._open], key), 1)
            value = torch.cat((self._cache.open_values[layer, self._slot, :, : self._open], value), 1)
        seen = self._seen(scoring.visibility)
        output, lse = prefill_attention(
            query,
            key,
            value,
            self._start,
            scale=scoring.scale,
            prefix=self._prefix(layer, seen.past),
            first=seen.first,
            softcap=scoring.softcap,
            sink_logits=scoring.sinks,
            lse_rows=None if self._probes is None else self._probes.rows,
        )
        scores = None
        if self._probes is not None and lse is not None:
            scores = self._probes.scores(query, key, lse, scoring)
            if self._open:
                scores[0] += self._cache.open_scores[layer, self._slot]
        self._write(layer, key, value, scores)
        return output.to(query.dtype)

    def _seen(self, visibility: Visibility) -> _Seen:
        seen = self._views.get(visibility)
        if seen is None:
            firsts = [visibility.first(position) for position in range(self._start, self._end)]
            base = min(firsts[0] // self._cache.layout.block_tokens, self._sealed)
            first = torch.tensor(firsts, dtype=torch.int32, device=self._cache.device) if firsts[-1] else None
            seen = self._views[visibility] = _Seen(slice(base, self._sealed), first)
        return seen

    def _prefix(self, layer: int, past: slice) -> Prefix | None:
        """Sealed blocks as they are, or decoded where the codec must."""
        if past.start == past.stop:
            return None
        codec, slabs, sink_slabs = self._cache.codec, self._slabs[past], self._sink_slabs[past]
        sealed = codec.sealed()
        if sealed is None:
            sealed, layer = decoded(codec, layer, slabs, sink_slabs), 0
            slabs = torch.arange(len(slabs), device=slabs.device)
        return Prefix(sealed.form, sealed.data[:, layer], slabs, sealed.sinks[:, layer], sink_slabs)

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Stores tokens from the open block's first one on: full blocks sealed, the rest in the open block."""
        cache = self._cache
        size = cache.layout.block_tokens
        blocks = self.full_blocks
        if blocks:
            full_keys, full_values = (
                torch.unflatten(part[:, : blocks * size], 1, (blocks, size)).transpose(0, 1) for part in (key, value)
            )
            of_full = scores[:blocks] if scores is not None else None
            slabs, sink_slabs = self._slabs[self._sealed :], self._sink_slabs[self._sealed :]
            status = cache.codec.write_blocks(layer, slabs, sink_slabs, full_keys, full_values, of_full)
            if status is not None:
                self.refused.append((layer, status))
        rest = self._end % size
        for open_block, part in ((cache.open_keys, key), (cache.open_values, value)):
            open_block[layer, self._slot, :, :rest] = part[:, blocks * size :]
            open_block[layer, self._slot, :, rest:] = 0
        if scores is not None:
            cache.open_scores[layer, self._slot] = scores[-1] if rest else 0
