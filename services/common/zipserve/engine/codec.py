"""How a block's payload is coded. `raw` keeps the model's dtype, and is the exact control for every other codec."""

from typing import Protocol

import torch

from zipserve.common.errors import LayoutMismatchError
from zipserve.common.kv.layout import DTYPE_BYTES, HEADER_BYTES, Layout

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Codec(Protocol):
    """Encodes and decodes blocks in an arena, one layer at a time."""

    def write_blocks(self, layer: int, slabs: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Encodes one layer of complete blocks.

        Args:
            slabs: [n] int64, where to.
            keys: [n, kv_heads, block_tokens, key_dim], after rotary embedding.
            values: [n, kv_heads, block_tokens, value_dim].
        """

    def read_blocks(self, layer: int, slabs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes one layer of blocks `slabs` [n] int64: keys and values, shaped as in `write_blocks`."""


class RawCodec:
    """Keys and values as they are."""

    def __init__(self, layout: Layout, arena: torch.Tensor) -> None:
        """`arena` is uint8 [blocks, layout.block_slab_bytes]."""
        # [blocks, layers, kv_heads, elements]: one head's segment of one layer is contiguous, keys before values.
        self._heads = payload(layout, arena, layout.block_tokens)
        self._keys = (layout.block_tokens, layout.key_dim)
        self._values = (layout.block_tokens, layout.value_dim)
        self._key_elements = layout.block_tokens * layout.key_dim

    def write_blocks(self, layer: int, slabs: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See Codec."""
        self._heads[slabs, layer] = torch.cat((keys.flatten(2), values.flatten(2)), dim=2)

    def read_blocks(self, layer: int, slabs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See Codec."""
        heads = self._heads[:, layer].index_select(0, slabs)
        keys = torch.unflatten(heads[..., : self._key_elements], 2, self._keys)
        return keys, torch.unflatten(heads[..., self._key_elements :], 2, self._values)


def payload(layout: Layout, arena: torch.Tensor, tokens: int) -> torch.Tensor:
    """View of an arena's payloads in the raw form: [slabs, layers, kv_heads, tokens * (key_dim + value_dim)].

    Args:
        arena: uint8 [slabs, slab bytes], contiguous.
        tokens: how many tokens a payload holds; block_tokens for blocks, fewer for tails.
    """
    start = HEADER_BYTES // DTYPE_BYTES[layout.dtype]
    shape = (layout.layers, layout.kv_heads, tokens * (layout.key_dim + layout.value_dim))
    typed = arena.view(TORCH_DTYPES[layout.dtype])
    return torch.unflatten(typed[:, start : start + shape[0] * shape[1] * shape[2]], 1, shape)


def codec_for(layout: Layout, arena: torch.Tensor) -> Codec:
    """The codec that a layout names.

    Raises:
        LayoutMismatchError: the engine does not know it.
    """
    if layout.codec == "raw":
        return RawCodec(layout, arena)
    raise LayoutMismatchError(f"the engine has no codec {layout.codec!r}")
