"""ZipCache (2024) as published, with a block where the paper has the whole sequence: the codec to compare with.

Section 4: 60 % of the tokens are salient and get 4 bits, the others 2. Keys are quantized channelwise, each class by
itself; values tokenwise over all heads, after each channel was divided by the root of its largest magnitude.
"""

import torch

from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.engine.codec.arenas import TORCH_DTYPES, Arenas, views
from zipserve.engine.codec.interface import Sealed
from zipserve.engine.codec.uniform import status_of
from zipserve.kernels.zipformat import probe_counts

_BITS = {"hi": 4, "lo": 2}
_STEP_MIN = 2.0**-24


class ZipCacheCodec:
    """See zipserve.engine.codec.interface.Codec."""

    needs_scores = True

    def __init__(self, layout: Layout, arenas: Arenas) -> None:
        self._layout = layout
        self._fields = views(layout, SlabKind.BLOCK, layout.block_tokens, arenas.blocks)
        self._dtype = TORCH_DTYPES[layout.dtype]
        self._salient = layout.zipcache_salient_tokens

    def write_blocks(
        self,
        layer: int,
        slabs: torch.Tensor,
        sink_slabs: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        assert scores is not None
        normalized = scores / torch.tensor(probe_counts(self._layout.block_tokens), device=scores.device)
        best = normalized.argsort(dim=1, descending=True, stable=True)[:, : self._salient]
        hi = torch.zeros_like(normalized, dtype=torch.bool).scatter_(1, best, value=True)
        order = _order(hi)[:, None, :, None]
        keys = keys.float().gather(2, order.expand_as(keys))
        values = values.float().gather(2, order.expand_as(values))

        channels = values.abs().amax(2).sqrt().clamp_min(_STEP_MIN).half()  # [n, kv_heads, value_dim]
        scaled = values / channels.float()[:, :, None]
        key_parameters: list[list[torch.Tensor]] = []
        value_parameters: list[list[torch.Tensor]] = []
        for name, slots in self._classes():
            key_codes, *of_class = _encode(keys[:, :, slots], (2,), _BITS[name])
            key_parameters.append(of_class)
            value_codes, *of_tokens = _encode(scaled[:, :, slots], (1, 3), _BITS[name])
            value_parameters.append(of_tokens)
            self._fields[f"key_codes_{name}"][slabs, layer] = key_codes
            self._fields[f"value_codes_{name}"][slabs, layer] = value_codes
        # [n, minimum and step, class, kv_heads, key_dim] and [n, minimum and step, slots]
        of_keys = torch.stack([torch.stack([p[i].squeeze(2) for p in key_parameters], 1) for i in (0, 1)], 1)
        of_values = torch.stack(
            [torch.cat([p[i].squeeze(3).squeeze(1) for p in value_parameters], 1) for i in (0, 1)], 1
        )
        weights = 1 << torch.arange(8, device=hi.device)
        for name, content in (
            ("key_parameters", of_keys),
            ("value_parameters", of_values),
            ("value_channels", channels),
            ("classes", (hi.view(len(hi), -1, 8).long() * weights).sum(2).to(torch.uint8)),
        ):
            self._fields[name][slabs, layer] = content
        return status_of(keys, values, of_keys, of_values, channels)

    def read_blocks(
        self, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read = {name: field[:, layer].index_select(0, slabs) for name, field in self._fields.items()}
        shifts = torch.arange(8, device=slabs.device)
        hi = ((read["classes"][..., None].long() >> shifts) & 1).flatten(1).bool()
        keys, values = [], []
        for of, (name, slots) in enumerate(self._classes()):
            key_minima, key_steps = read["key_parameters"][:, :, of, :, None].float().unbind(1)
            value_minima, value_steps = read["value_parameters"][:, :, None, slots, None].float().unbind(1)
            keys.append(_unpack(read[f"key_codes_{name}"], _BITS[name]) * key_steps + key_minima)
            values.append(_unpack(read[f"value_codes_{name}"], _BITS[name]) * value_steps + value_minima)
        slot = _order(hi).argsort(1)[:, None, :, None]
        all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2) * read["value_channels"].float()[:, :, None]
        return (
            all_keys.gather(2, slot.expand_as(all_keys)).to(self._dtype),
            all_values.gather(2, slot.expand_as(all_values)).to(self._dtype),
        )

    def sealed(self) -> Sealed | None:
        return None

    def _classes(self) -> list[tuple[str, slice]]:
        """Name and slots of each class."""
        return [("hi", slice(0, self._salient)), ("lo", slice(self._salient, self._layout.block_tokens))]


def _order(hi: torch.Tensor) -> torch.Tensor:
    """int64 [n, slots]: the token of each slot, salient ones first."""
    return torch.argsort((~hi).to(torch.int8), dim=1, stable=True)


def _encode(x: torch.Tensor, dims: tuple[int, ...], bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes, packed along the last dimension, and float16 minimum and step over `dims`, which are kept as 1."""
    cells = (1 << bits) - 1
    minimum = x.amin(dims, keepdim=True).half()
    step = ((x.amax(dims, keepdim=True) - minimum.float()) / cells).clamp_min(_STEP_MIN).half()
    codes = torch.round((x - minimum.float()) / step.float()).clamp(0, cells).to(torch.uint8)
    per_byte = 8 // bits
    places = (bits * torch.arange(per_byte, device=x.device)).to(torch.uint8)
    return (torch.unflatten(codes, -1, (-1, per_byte)) << places).sum(-1).to(torch.uint8), minimum, step


def _unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    places = (bits * torch.arange(8 // bits, device=codes.device)).to(torch.uint8)
    return ((codes[..., None] >> places) & ((1 << bits) - 1)).flatten(-2).float()
