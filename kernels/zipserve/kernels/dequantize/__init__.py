"""Decodes blocks of the `zip` format: the reverse of zipserve.kernels.quantize."""

import ctypes

import torch

from zipserve.kernels import abi, native
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

    Raises:
        ValueError: a tensor has another shape or dtype, on the CPU.
        IndexError: a slab does not exist.
    """
    if blocks.is_cuda:
        from zipserve.kernels.dequantize.triton_kernel import dequantize_triton  # noqa: PLC0415  a CPU needs no Triton

        return dequantize_triton(blocks, slabs, form, sinks, sink_slabs)
    if blocks.device.type == "cpu" and (library := native.load()) is not None:
        return _dequantize_cpu(library, blocks, slabs, form, sinks, sink_slabs)
    return dequantize_reference(blocks, slabs, form, sinks, sink_slabs)


def _dequantize_cpu(
    library: ctypes.CDLL,
    blocks: torch.Tensor,
    slabs: torch.Tensor,
    form: ZipFormat,
    sinks: torch.Tensor,
    sink_slabs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    slabs, sink_slabs = slabs.contiguous(), sink_slabs.contiguous()
    count, heads, tokens = slabs.shape[0], form.kv_heads, form.block_tokens
    keys = torch.empty(count, heads, tokens, form.key_dim)
    values = torch.empty(count, heads, tokens, form.value_dim)
    missing = library.zs_dequantize(
        ctypes.byref(abi.format_of(form)),
        ctypes.byref(abi.slabs_of(blocks, slabs, form.layer_bytes, count)),
        ctypes.byref(abi.slabs_of(sinks, sink_slabs, form.sinks_layer_bytes, count)),
        count,
        torch.get_num_threads(),
        ctypes.c_void_p(keys.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
    )
    abi.check_slabs(missing, slabs, sink_slabs)
    return keys, values
