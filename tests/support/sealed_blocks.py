"""Sealed blocks for tests of attention, among bytes that nobody may read."""

import functools

import torch

from zipserve.kernels.attention import RawFormat
from zipserve.kernels.quantize import quantize_reference
from zipserve.kernels.saliency import classify
from zipserve.kernels.zipformat import ZipFormat

NAN_BYTE = 255
"""NaN in every float format, and the largest code and exponent."""
_SLABS, _HEADER_BYTES = 7, 128


@functools.cache
def blocks_of(form: ZipFormat | RawFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of an arena, and sinks: slabs 2 and 4 start a sequence, whose sinks are in 1 and 3; 5 and 6 do not.

    Slab 0 and all that is between the layers is NaN.
    """
    generator = torch.Generator().manual_seed(form.key_dim)
    arena = torch.full((_SLABS, _HEADER_BYTES + form.layer_bytes + 64), NAN_BYTE, dtype=torch.uint8)
    data = arena[:, _HEADER_BYTES : _HEADER_BYTES + form.layer_bytes]
    slabs, at_start = torch.tensor([2, 4, 5, 6]), torch.tensor([True, True, False, False])
    keys = torch.randn(4, form.kv_heads, form.block_tokens, form.key_dim, generator=generator)
    values = torch.randn(4, form.kv_heads, form.block_tokens, form.value_dim, generator=generator)
    if isinstance(form, RawFormat):
        heads = torch.cat((keys.flatten(2), values.flatten(2)), 2).to(form.dtype)
        data[slabs] = heads.flatten(1).view(torch.uint8)
        return data, torch.empty(0, 0, dtype=torch.uint8)
    sinks = torch.full((_SLABS, form.sinks_layer_bytes + 32), NAN_BYTE, dtype=torch.uint8)[:, 16:-16]
    hi = classify(torch.rand(4, form.block_tokens, generator=generator), form, at_start)
    sink_slabs = torch.tensor([1, 3, -1, -1])
    assert not quantize_reference(keys, values, hi, form, data, slabs, sinks, sink_slabs).any()
    return data, sinks
