"""Quantizes complete blocks into the `zip` format (zipserve.kernels.zipformat): rotation, codes and packing in one."""

import torch

from zipserve.kernels.quantize.reference import NON_FINITE, OUT_OF_RANGE, quantize_reference
from zipserve.kernels.zipformat import ZipFormat

__all__ = ["NON_FINITE", "OUT_OF_RANGE", "quantize", "quantize_reference"]


def quantize(
    keys: torch.Tensor,
    values: torch.Tensor,
    hi: torch.Tensor,
    form: ZipFormat,
    out: torch.Tensor,
    slabs: torch.Tensor,
    sinks: torch.Tensor,
    sink_slabs: torch.Tensor,
) -> torch.Tensor:
    """Encodes one layer of n blocks and writes it to their slabs.

    Args:
        keys: [n, kv_heads, block_tokens, key_dim], after rotary embedding, of any float dtype; any strides whose last
            is 1.
        values: [n, kv_heads, block_tokens, value_dim], likewise.
        hi: bool [n, block_tokens]: the tokens of the hi class, form.hi_tokens in each block.
        out: uint8 [slabs, form.layer_bytes]: this layer in all slabs; a view with any stride between slabs.
        slabs: int64 [n], where to.
        sinks: uint8 [slabs, form.sinks_layer_bytes], likewise.
        sink_slabs: int64 [n]: for a block at position 0 the slab for its sinks, which `hi` must count as hi; else -1.

    Returns:
        int32 [n]: 0, or why a block was refused: NON_FINITE (a NaN or infinity in it) or OUT_OF_RANGE (float16 or an
        exponent cannot hold a parameter). The bytes of a refused block are undefined.
    """
    return quantize_reference(keys, values, hi, form, out, slabs, sinks, sink_slabs)
