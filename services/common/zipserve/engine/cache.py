"""All KV of one worker: sealed blocks, sinks and packed tails in arenas, and the open blocks that sequences grow in.

The arenas are plain bytes that the transfer service registers and other workers read; headers and checksums are written
and verified outside. Open blocks are working memory in the model's dtype and never leave the device as they are.
"""

import torch

from zipserve.common.errors import KvValueError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.engine.codec import REFUSALS, TORCH_DTYPES, Arenas, codec_for
from zipserve.engine.codec.arenas import views
from zipserve.engine.codec.uniform import decode_int8, encode_int8, status_of


class KvCache:
    """KV memory for sequences of one layout. Slabs and slots are numbered from 0; who holds which is not known here."""

    def __init__(
        self,
        layout: Layout,
        blocks: int,
        tails: int,
        slots: int,
        sinks: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates everything at once.

        Args:
            blocks: slabs for sealed blocks.
            tails: slabs for packed tails.
            slots: open blocks, one for each sequence that is being computed.
            sinks: slabs for sinks, where the codec has them; None: as many as blocks.
        """
        self.layout = layout
        self.device = torch.device(device)
        self.blocks, self.tails, self.slots = blocks, tails, slots
        self.sinks = (blocks if sinks is None else sinks) if layout.has_sinks else 0
        self.arenas = Arenas.allocate(layout, blocks=blocks, tails=tails, sinks=self.sinks, device=device)
        self.codec = codec_for(layout, self.arenas)
        shape = (layout.layers, slots, layout.kv_heads, layout.block_tokens)
        dtype = TORCH_DTYPES[layout.dtype]
        # Tokens of an open block that do not exist yet are zeros: they get weight 0, and 0 * NaN would not be 0.
        self.open_keys = torch.zeros((*shape, layout.key_dim), dtype=dtype, device=self.device)
        """[layers, slots, kv_heads, block_tokens, key_dim]"""
        self.open_values = torch.zeros((*shape, layout.value_dim), dtype=dtype, device=self.device)
        """[layers, slots, kv_heads, block_tokens, value_dim]"""
        self.open_scores = torch.zeros(layout.layers, slots, layout.block_tokens, device=self.device)
        """float32 [layers, slots, block_tokens]: what the block's probe rows so far pay to its tokens. Stays zero where
        the codec needs no scores."""

    def slab(self, kind: SlabKind, slab: int) -> memoryview:
        """Writable bytes of a slab (host memory only)."""
        return self.arenas.of(kind)[slab].numpy().data

    def pack_tail(self, slot: int, tokens: int, slab: int) -> None:
        """Writes the first `tokens` tokens of an open block into a tail slab, without gaps (layout.tail_fields).

        Raises:
            KvValueError: a key or value is not finite or too large.
        """
        tail = self._tail(slab, tokens)
        keys, values = self.open_keys[:, slot, :, :tokens], self.open_values[:, slot, :, :tokens]
        if "heads" in tail:
            self._refuse(status_of(keys, values))
            tail["heads"].copy_(torch.cat((keys.flatten(2), values.flatten(2)), 2))
            return
        key_codes, key_scales = encode_int8(keys)
        value_codes, value_scales = encode_int8(values)
        scales = torch.stack((key_scales, value_scales), -1)
        self._refuse(status_of(keys, values, scales))
        tail["scales"].copy_(scales)
        tail["key_codes"].copy_(key_codes)
        tail["value_codes"].copy_(value_codes)
        if "scores" in tail:
            tail["scores"].copy_(self.open_scores[:, slot, :tokens])

    def unpack_tail(self, slab: int, tokens: int, slot: int) -> None:
        """Fills an open block with the `tokens` tokens of a tail slab: the reverse of `pack_tail`."""
        tail, layout = self._tail(slab, tokens), self.layout
        if "heads" in tail:
            border = tokens * layout.key_dim
            keys = torch.unflatten(tail["heads"][..., :border], 2, (tokens, layout.key_dim))
            values = torch.unflatten(tail["heads"][..., border:], 2, (tokens, layout.value_dim))
        else:
            keys = decode_int8(tail["key_codes"], tail["scales"][..., 0])
            values = decode_int8(tail["value_codes"], tail["scales"][..., 1])
        for open_block, part in ((self.open_keys, keys), (self.open_values, values)):
            open_block[:, slot, :, :tokens].copy_(part)
            open_block[:, slot, :, tokens:] = 0
        self.open_scores[:, slot] = 0
        if "scores" in tail:
            self.open_scores[:, slot, :tokens] = tail["scores"]

    @staticmethod
    def _refuse(statuses: torch.Tensor) -> None:
        """Raises for the first layer of a tail whose status is not 0."""
        for layer, status in enumerate(statuses.tolist()):
            if status:
                raise KvValueError(f"the tail of layer {layer} cannot be sealed: {REFUSALS[status]}")

    def _tail(self, slab: int, tokens: int) -> dict[str, torch.Tensor]:
        """Fields of a tail slab: [layers, *shape]."""
        if not 0 <= tokens < self.layout.block_tokens:
            raise ValueError(f"a tail holds 0 to {self.layout.block_tokens - 1} tokens, not {tokens}")
        arena = self.arenas.tails[slab : slab + 1]
        return {name: field[0] for name, field in views(self.layout, SlabKind.TAIL, tokens, arena).items()}
