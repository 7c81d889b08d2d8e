"""Keys and values as they are."""

import torch

from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.engine.codec.arenas import TORCH_DTYPES, Arenas, views
from zipserve.engine.codec.interface import Sealed
from zipserve.engine.codec.uniform import status_of
from zipserve.kernels.attention import RawFormat


class RawCodec:
    """See zipserve.engine.codec.interface.Codec."""

    needs_scores = False

    def __init__(self, layout: Layout, arenas: Arenas) -> None:
        self._heads = views(layout, SlabKind.BLOCK, layout.block_tokens, arenas.blocks)["heads"]
        self._form = RawFormat(
            layout.kv_heads, layout.key_dim, layout.value_dim, layout.block_tokens, TORCH_DTYPES[layout.dtype]
        )
        octets = self._heads.flatten(2).view(torch.uint8)
        self._sealed = Sealed(self._form, octets, octets.new_empty(0, layout.layers, 0))

    def write_blocks(
        self,
        layer: int,
        slabs: torch.Tensor,
        sink_slabs: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        self._heads[slabs, layer] = torch.cat((keys.flatten(2), values.flatten(2)), dim=2).to(self._heads.dtype)
        return status_of(keys, values)

    def read_blocks(
        self, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._form.decode(self._sealed.data[:, layer], slabs)

    def sealed(self) -> Sealed | None:
        return self._sealed
