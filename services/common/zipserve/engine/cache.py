"""All KV of one worker: sealed blocks and packed tails in two arenas, and the open blocks that sequences grow in.

The arenas are plain bytes that the transfer service registers and other workers read; headers and checksums are written
and verified outside. Open blocks are working memory in the model's dtype and never leave the device as they are.
"""

import torch

from zipserve.common.kv.layout import SLAB_ALIGNMENT_BYTES, Layout
from zipserve.engine.codec import TORCH_DTYPES, codec_for, payload


class KvCache:
    """KV memory for sequences of one layout. Slabs and slots are numbered from 0; who holds which is not known here."""

    def __init__(self, layout: Layout, blocks: int, tails: int, slots: int, device: torch.device | str = "cpu") -> None:
        """Allocates everything at once.

        Args:
            blocks: slabs for sealed blocks.
            tails: slabs for packed tails.
            slots: open blocks, one for each sequence that is being computed.
        """
        self.layout = layout
        self.device = torch.device(device)
        self.blocks, self.tails, self.slots = blocks, tails, slots
        self.block_arena = _arena(blocks, layout.block_slab_bytes, self.device)
        self.tail_arena = _arena(tails, layout.tail_slab_bytes, self.device)
        self.codec = codec_for(layout, self.block_arena)
        shape = (layout.layers, slots, layout.kv_heads, layout.block_tokens)
        dtype = TORCH_DTYPES[layout.dtype]
        # Tokens of an open block that do not exist yet are zeros: they get weight 0, and 0 * NaN would not be 0.
        self.open_keys = torch.zeros((*shape, layout.key_dim), dtype=dtype, device=self.device)
        """[layers, slots, kv_heads, block_tokens, key_dim]"""
        self.open_values = torch.zeros((*shape, layout.value_dim), dtype=dtype, device=self.device)
        """[layers, slots, kv_heads, block_tokens, value_dim]"""

    def block_slab(self, slab: int) -> memoryview:
        """Writable bytes of a slab of the block arena (host memory only)."""
        return self.block_arena[slab].numpy().data

    def tail_slab(self, slab: int) -> memoryview:
        """Writable bytes of a slab of the tail arena (host memory only)."""
        return self.tail_arena[slab].numpy().data

    def pack_tail(self, slot: int, tokens: int, slab: int) -> None:
        """Writes the first `tokens` tokens of an open block into a tail slab, without gaps.

        The payload is that of a block with `tokens` tokens: [layer][kv head][keys, then values].
        """
        keys, values = self._tail(slab, tokens)
        keys.copy_(self.open_keys[:, slot, :, :tokens])
        values.copy_(self.open_values[:, slot, :, :tokens])

    def unpack_tail(self, slab: int, tokens: int, slot: int) -> None:
        """Fills an open block with the `tokens` tokens of a tail slab: the reverse of `pack_tail`."""
        keys, values = self._tail(slab, tokens)
        for open_block, tail in ((self.open_keys, keys), (self.open_values, values)):
            open_block[:, slot, :, :tokens].copy_(tail)
            open_block[:, slot, :, tokens:] = 0

    def _tail(self, slab: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a tail's keys [layers, kv_heads, tokens, key_dim] and values."""
        if not 0 <= tokens < self.layout.block_tokens:
            raise ValueError(f"a tail holds 0 to {self.layout.block_tokens - 1} tokens, not {tokens}")
        heads = payload(self.layout, self.tail_arena, tokens)[slab]
        border = tokens * self.layout.key_dim
        keys = torch.unflatten(heads[..., :border], 2, (tokens, self.layout.key_dim))
        return keys, torch.unflatten(heads[..., border:], 2, (tokens, self.layout.value_dim))


def _arena(slabs: int, slab_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed uint8 [slabs, slab_bytes] that starts at a page: transports register whole pages."""
    memory = torch.zeros(slabs * slab_bytes + SLAB_ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % SLAB_ALIGNMENT_BYTES
    return memory[start : start + slabs * slab_bytes].view(slabs, slab_bytes)
