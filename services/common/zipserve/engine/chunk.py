"""Attention and KV of several new tokens of one sequence: a prompt, or a part of it."""

import torch

from zipserve.engine.attention import Scoring, Visibility, attend
from zipserve.engine.cache import KvCache
from zipserve.engine.probes import Probes
from zipserve.engine.sequence import Sequence

TILE_TOKENS = 512
"""Queries that share one mask: bounds its memory, and lets windows skip the keys that no query of a tile sees."""


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
        self._masks: dict[tuple[Visibility, int, int], torch.Tensor] = {}
        self._probes = Probes(self._start, self._end, size, cache.device) if cache.codec.needs_scores else None
        self.full_blocks = blocks - self._sealed
        """Blocks that become full."""
        self.refused: list[tuple[int, torch.Tensor]] = []
        """Layer and status of these blocks, where a codec may have refused one."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Attention over the sealed blocks, the open block and the new tokens, which are then written.

        Args: as Attender.attend; returns [heads, tokens, value_dim].
        """
        if self._open:
            key = torch.cat((self._cache.open_keys[layer, self._slot, :, : self._open], key), 1)
            value = torch.cat((self._cache.open_values[layer, self._slot, :, : self._open], value), 1)
        seen = scoring.visibility
        base = min(seen.first(self._start) // self._cache.layout.block_tokens, self._sealed)
        all_keys, all_values = self._with_past(layer, base, key, value)
        offset = base * self._cache.layout.block_tokens  # position of the first key
        output = self._over_past(query, all_keys, all_values, scoring, offset)
        scores = None
        if self._probes is not None:
            scores = self._probes.scores(query, all_keys, scoring, offset)
            if self._open:
                scores[0] += self._cache.open_scores[layer, self._slot]
        self._write(layer, key, value, scores)
        return output

    def _with_past(
        self, layer: int, base: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from block `base` on; `key` and `value` start with the open block."""
        if base == self._sealed:
            return key, value
        past = slice(base, self._sealed)
        past_key, past_value = self._cache.codec.read_blocks(layer, self._slabs[past], self._sink_slabs[past])
        return (
            torch.cat((past_key.transpose(0, 1).flatten(1, 2), key), 1),
            torch.cat((past_value.transpose(0, 1).flatten(1, 2), value), 1),
        )

    def _over_past(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, offset: int
    ) -> torch.Tensor:
        seen = scoring.visibility
        if self._start == 0 and seen.first(self._end - 1) == 0:
            return attend(query, key, value, scoring, None)
        outputs = []
        for start in range(self._start, self._end, TILE_TOKENS):
            end = min(start + TILE_TOKENS, self._end)
            first = seen.first(start)
            queries, keys = slice(start - self._start, end - self._start), slice(first - offset, end - offset)
            mask = self._mask(seen, start, end)
            outputs.append(attend(query[:, queries], key[:, keys], value[:, keys], scoring, mask))
        return torch.cat(outputs, 1)

    def _mask(self, visibility: Visibility, start: int, end: int) -> torch.Tensor:
        """Of queries start .. end over keys first(start) .. end; made once for all layers that see alike."""
        mask = self._masks.get((visibility, start, end))
        if mask is None:
            queries = torch.arange(start, end, device=self._cache.device)
            keys = torch.arange(visibility.first(start), end, device=self._cache.device)
            mask = self._masks[visibility, start, end] = visibility.mask(queries[:, None], keys)
        return mask

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
