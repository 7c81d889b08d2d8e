"""KV of sequences that had to make room: out of the cache into host memory, and back, byte for byte."""

from dataclasses import dataclass

import torch

from zipserve.common.kv.layout import DTYPE_BYTES, Layout, SlabKind
from zipserve.engine.cache import KvCache
from zipserve.engine.sequence import Sequence


@dataclass(frozen=True)
class ParkedKv:
    """All KV of one sequence, in host memory."""

    blocks: torch.Tensor
    """uint8 [sealed blocks, slab bytes]"""
    sinks: torch.Tensor
    """uint8 [0 or 1, slab bytes]"""
    keys: torch.Tensor
    """[layers, kv_heads, open tokens, key_dim]"""
    values: torch.Tensor
    """[layers, kv_heads, open tokens, value_dim]"""
    scores: torch.Tensor
    """float32 [layers, block_tokens]: of the open block."""


def parked_bytes(layout: Layout, tokens: int) -> int:
    """Host memory of a parked sequence of `tokens` tokens."""
    blocks, rest = divmod(tokens, layout.block_tokens)
    sealed = blocks * layout.slab_bytes(SlabKind.BLOCK) + (blocks > 0) * layout.slab_bytes(SlabKind.SINKS)
    values = rest * layout.kv_heads * (layout.key_dim + layout.value_dim)
    scores = layout.block_tokens * DTYPE_BYTES["float32"]
    return sealed + layout.layers * (values * DTYPE_BYTES[layout.dtype] + scores)


def park(cache: KvCache, sequence: Sequence) -> ParkedKv:
    """Copies the KV of a sequence out; its slabs and slot may be given to others then."""
    sealed, rest = divmod(sequence.length, cache.layout.block_tokens)
    sinks = [sequence.sinks] if sealed and cache.layout.has_sinks else []
    return ParkedKv(
        cache.arenas.blocks[sequence.blocks[:sealed]].cpu(),
        cache.arenas.sinks[sinks].cpu(),
        _copied(cache.open_keys[:, sequence.slot, :, :rest]),
        _copied(cache.open_values[:, sequence.slot, :, :rest]),
        _copied(cache.open_scores[:, sequence.slot]),
    )


def restore(cache: KvCache, parked: ParkedKv, sequence: Sequence) -> None:
    """Copies the KV of a sequence into the slabs and the slot that it has now."""
    sealed, rest = divmod(sequence.length, cache.layout.block_tokens)
    device = cache.device
    cache.arenas.blocks[sequence.blocks[:sealed]] = parked.blocks.to(device)
    if len(parked.sinks):
        cache.arenas.sinks[[sequence.sinks]] = parked.sinks.to(device)
    for open_block, part in ((cache.open_keys, parked.keys), (cache.open_values, parked.values)):
        open_block[:, sequence.slot, :, :rest] = part.to(device)
        open_block[:, sequence.slot, :, rest:] = 0
    cache.open_scores[:, sequence.slot] = parked.scores.to(device)


def _copied(part: torch.Tensor) -> torch.Tensor:
    return part.to("cpu", copy=True)
