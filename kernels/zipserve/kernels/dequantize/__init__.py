"""Decodes blocks of the `zip` format: the reverse of zipserve.kernels.quantize."""

import torch

from zipserve.kernels.dequantize.reference import dequantize_reference
from zipserve.kernels.zipformat import ZipFormat

__all__ = ["dequantize", "dequantize_reference"]


def dequantize(
    blocks: torch.Tensor, slabs: torch.Tensor, form: ZipFormat, sinks: torch.Tensor, sink_slabs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes one layer of n blocks, in the order of positions and without the rotation.

    Args:
        blocks: uint8 [slabs, form.layer_bytes]: this layer in all slabs; a view with any stride between slabs.
        slabs: int64 [n].
        sinks: uint8 [slabs, form.sinks_layer_bytes], likewise.
        sink_slabs: int64 [n]: for a block at position 0 the slab of its sinks, else -1.

    Returns:
        float32 keys [n, kv_heads, block_tokens, key_dim] and values [n, kv_heads, block_tokens, value_dim].
    """
    return dequantize_reference(blocks, slabs, form, sinks, sink_slabs)
