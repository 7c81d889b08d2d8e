"""Uniform codes for each token and head: 8 bits, symmetric, also for tails; and 4 bits between minimum and maximum."""

import torch

from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.engine.codec.arenas import TORCH_DTYPES, Arenas, views
from zipserve.engine.codec.interface import Sealed
from zipserve.kernels.quantize import NON_FINITE, OUT_OF_RANGE

_INT8_MAX = 127
_STEP_MIN = 2.0**-24
"""Smallest float16 above 0: rows of zeros have a step."""


def encode_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., dim] as int8 codes of the same shape and float16 scales [...]; infinite where float16 is too small."""
    scales = (x.float().abs().amax(-1) / _INT8_MAX).clamp_min(_STEP_MIN).half()
    codes = torch.round(x.float() / scales.float()[..., None]).clamp(-_INT8_MAX, _INT8_MAX)
    return codes.to(torch.int8), scales


def decode_int8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 rows: the reverse of `encode_int8`."""
    return codes.float() * scales.float()[..., None]


def encode_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [..., dim] as codes, two a byte: uint8 [..., dim / 2], and float16 minima and steps [...]."""
    minima = x.float().amin(-1).half()
    steps = ((x.float().amax(-1) - minima.float()) / 15).clamp_min(_STEP_MIN).half()
    codes = torch.round((x.float() - minima.float()[..., None]) / steps.float()[..., None]).clamp(0, 15).to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4), minima, steps


def decode_int4(codes: torch.Tensor, minima: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """float32 rows: the reverse of `encode_int4`."""
    both = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return both.float() * steps.float()[..., None] + minima.float()[..., None]


def status_of(blocks: torch.Tensor, values: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """int32 [n]: why each of n blocks must be refused, or 0; all tensors start with [n, ...]."""
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in (blocks, values)]).all(0)
    status = torch.zeros(len(blocks), dtype=torch.int32, device=blocks.device)
    for part in parameters:
        status[~part.flatten(1).isfinite().all(1)] = OUT_OF_RANGE
    status[~finite] = NON_FINITE
    return status


class _Uniform:
    """What both codecs share."""

    needs_scores = False

    def __init__(self, layout: Layout, arenas: Arenas) -> None:
        self._fields = views(layout, SlabKind.BLOCK, layout.block_tokens, arenas.blocks)
        self._dtype = TORCH_DTYPES[layout.dtype]

    def sealed(self) -> Sealed | None:
        """See Codec."""
        return None

    def _write(self, layer: int, slabs: torch.Tensor, **fields: torch.Tensor) -> None:
        for name, content in fields.items():
            self._fields[name][slabs, layer] = content

    def _read(self, name: str, layer: int, slabs: torch.Tensor) -> torch.Tensor:
        return self._fields[name][:, layer].index_select(0, slabs)


class Int8Codec(_Uniform):
    """See zipserve.engine.codec.interface.Codec."""

    def write_blocks(
        self,
        layer: int,
        slabs: torch.Tensor,
        sink_slabs: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        key_codes, key_scales = encode_int8(keys)
        value_codes, value_scales = encode_int8(values)
        scales = torch.stack((key_scales, value_scales), -1)
        self._write(layer, slabs, scales=scales, key_codes=key_codes, value_codes=value_codes)
        return status_of(keys, values, scales)

    def read_blocks(
        self, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self._read("scales", layer, slabs)
        keys = decode_int8(self._read("key_codes", layer, slabs), scales[..., 0])
        values = decode_int8(self._read("value_codes", layer, slabs), scales[..., 1])
        return keys.to(self._dtype), values.to(self._dtype)


class Int4Codec(_Uniform):
    """See zipserve.engine.codec.interface.Codec."""

    def write_blocks(
        self,
        layer: int,
        slabs: torch.Tensor,
        sink_slabs: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        key_codes, *key_parameters = encode_int4(keys)
        value_codes, *value_parameters = encode_int4(values)
        minima, steps = (torch.stack(pair, -1) for pair in zip(key_parameters, value_parameters, strict=True))
        self._write(layer, slabs, minima=minima, steps=steps, key_codes=key_codes, value_codes=value_codes)
        return status_of(keys, values, minima, steps)

    def read_blocks(
        self, layer: int, slabs: torch.Tensor, sink_slabs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        minima, steps = (self._read(name, layer, slabs) for name in ("minima", "steps"))
        keys = decode_int4(self._read("key_codes", layer, slabs), minima[..., 0], steps[..., 0])
        values = decode_int4(self._read("value_codes", layer, slabs), minima[..., 1], steps[..., 1])
        return keys.to(self._dtype), values.to(self._dtype)
