"""The zip codec: mixed precision by saliency, quantized once and attended over as it is."""

import torch

from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.engine.codec.arenas import TORCH_DTYPES, Arenas, views
from zipserve.engine.codec.interface import Sealed
from zipserve.kernels.dequantize import dequantize
from zipserve.kernels.quantize import quantize
from zipserve.kernels.saliency import classify
from zipserve.kernels.zipformat import SINK_TOKENS


class ZipCodec:
    """See zipserve.engine.codec.interface.Codec."""

    def __init__(self, layout: Layout, arenas: Arenas) -> None:
        assert layout.zip_format is not None
        self._form = layout.zip_format
        self.needs_scores = layout.needs_scores
        self._blocks = views(layout, SlabKind.BLOCK, layout.block_tokens, arenas.blocks)["layer"]
        self._sinks = views(layout, SlabKind.SINKS, SINK_TOKENS, arenas.sinks)["layer"]
        self._sealed = Sealed(self._form, self._blocks, self._sinks)
        self._dtype = TORCH_DTYPES[layout.dtype]

    def write_blocks(
        self,
        layer: int,
        slabs: torch.Tensor,
        sink_slabs: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if scores is None:
            scores = keys.new_zeros(len(slabs), self._form.block_tokens, dtype=torch.float32)
        hi = classify(scores, self._form, sink_slabs >= 0)
        return quantize(keys, values, hi, self._form, self._blocks[:, layer], slabs, self._sinks[:, layer], sink_slabs)

    def read_blocks(
        self, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = dequantize(self._blocks[:, layer], slabs, self._form, self._sinks[:, layer], sink_slabs)
        return keys.to(self._dtype), values.to(self._dtype)

    def sealed(self) -> Sealed | None:
        return self._sealed
