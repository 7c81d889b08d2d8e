"""What every codec can do."""

from dataclasses import dataclass
from typing import Protocol

import torch

from zipserve.common.kv.layout import Layout
from zipserve.engine.codec.arenas import Arenas
from zipserve.kernels.attention import RawFormat
from zipserve.kernels.quantize import NON_FINITE, OUT_OF_RANGE
from zipserve.kernels.zipformat import ZipFormat

REFUSALS = {
    NON_FINITE: "K or V is not finite",
    OUT_OF_RANGE: "K or V is too large for the codec's parameters (float16, up to 65504); codec raw can hold it",
}
"""Why `write_blocks` refuses a block, by its status."""


@dataclass(frozen=True)
class Sealed:
    """All layers of all blocks, as zipserve.kernels.attention.DecodeStep reads them."""

    form: ZipFormat | RawFormat
    data: torch.Tensor
    """uint8 [slabs, layers, form.layer_bytes]"""
    sinks: torch.Tensor
    """uint8 [sinks slabs, layers, form.sinks_layer_bytes]; without sinks nothing of the sort."""


class Codec(Protocol):
    """Encodes and decodes blocks, one layer at a time."""

    needs_scores: bool
    """Whether `write_blocks` classes tokens by their saliency."""

    def __init__(self, layout: Layout, arenas: Arenas) -> None:
        """Works on the slabs of `arenas`."""

    def write_blocks(
        self,
        layer: int,
        slabs: torch.Tensor,
        sink_slabs: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Encodes one layer of complete blocks.

        Args:
            slabs: int64 [n], where to.
            sink_slabs: int64 [n]: for a block at position 0 the slab of its sinks, else -1; ignored without sinks.
            keys: [n, kv_heads, block_tokens, key_dim], after rotary embedding.
            values: [n, kv_heads, block_tokens, value_dim].
            scores: float32 [n, block_tokens], see zipserve.kernels.saliency; needed where needs_scores.

        Returns:
            int32 [n], 0 or why a block was refused (REFUSALS); None where nothing is ever refused.
        """

    def read_blocks(
        self, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes one layer of blocks: keys and values, shaped as in `write_blocks`, in the model's dtype."""

    def sealed(self) -> Sealed | None:
        """What attention reads without decoding; None where blocks must be decoded first."""


def decoded(codec: Codec, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor) -> Sealed:
    """One layer of some blocks as raw ones, in the order of `slabs`: for attention that cannot read a codec's own."""
    keys, values = codec.read_blocks(layer, slabs, sink_slabs)
    form = RawFormat(keys.shape[1], keys.shape[3], values.shape[3], keys.shape[2], keys.dtype)
    data = torch.cat((keys.flatten(2), values.flatten(2)), 2).flatten(1).view(torch.uint8)
    return Sealed(form, data[:, None], data.new_empty(0, 1, 0))
