"""Several codecs over the same blocks, so that one prefill serves them all."""

from collections.abc import Iterable

import torch

from zipserve.common.errors import KvValueError
from zipserve.engine.cache import KvCache
from zipserve.engine.codec import REFUSALS, Arenas, Codec, Sealed, codec_for
from zipserve.engine.model import LoadedModel


class Fan:
    """A codec (zipserve.engine.codec.Codec) that writes to every codec, or answers as the selected one.

    Every codec has arenas of its own, with the same slab numbers. What is compared thus goes through the code that
    serves: saliency, sealing, decoding, attention on codes.
    """

    def __init__(self, model: LoadedModel, names: Iterable[str], cache: KvCache, sinks: int) -> None:
        """
        Args:
            names: of the codecs.
            cache: that this one is to serve; its block numbers are those of every codec.
            sinks: slabs for sinks, for codecs that have them.
        """
        self._codecs: dict[str, Codec] = {}
        for name in names:
            layout = model.layout(codec=name, block_tokens=cache.layout.block_tokens)
            arenas = Arenas.allocate(layout, blocks=cache.blocks, tails=0, sinks=sinks, device=cache.device)
            self._codecs[name] = codec_for(layout, arenas)
        self.select(None)

    def select(self, name: str | None) -> None:
        """Which codec writes and reads from now on; None: all write, and nothing can be read."""
        self._reader = None if name is None else self._codecs[name]
        self._writers = self._codecs if name is None else {name: self._codecs[name]}
        self.needs_scores = any(codec.needs_scores for codec in self._writers.values())

    def write_blocks(
        self,
        layer: int,
        slabs: torch.Tensor,
        sink_slabs: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """See Codec.

        Raises:
            KvValueError: a codec refuses a block; the message names the codec.
        """
        for name, codec in self._writers.items():
            status = codec.write_blocks(layer, slabs, sink_slabs, keys, values, scores)
            if status is not None and status.any():
                reason = REFUSALS[int(status[status != 0][0])]
                raise KvValueError(f"codec {name} cannot seal a block of layer {layer}: {reason}")
        return None

    def read_blocks(
        self, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Codec."""
        assert self._reader is not None, "no codec is selected that could answer"
        return self._reader.read_blocks(layer, slabs, sink_slabs)

    def sealed(self) -> Sealed | None:
        """See Codec."""
        assert self._reader is not None, "no codec is selected that could answer"
        return self._reader.sealed()
