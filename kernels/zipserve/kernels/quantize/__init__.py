"""Quantizes complete blocks into the `zip` format (zipserve.kernels.zipformat): rotation, codes and packing in one."""

import ctypes

import torch

from zipserve.kernels import abi, native
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

    Raises:
        ValueError: a tensor has another shape or dtype, on the CPU.
        IndexError: a slab does not exist; on the CPU nothing is written then.
    """
    if keys.is_cuda:
        from zipserve.kernels.quantize.triton_kernel import quantize_triton  # noqa: PLC0415  a CPU needs no Triton

        return quantize_triton(keys, values, hi, form, out, slabs, sinks, sink_slabs)
    if keys.device.type == "cpu" and (library := native.load()) is not None:
        return _quantize_cpu(library, keys, values, hi, form, out, slabs, sinks, sink_slabs)
    return quantize_reference(keys, values, hi, form, out, slabs, sinks, sink_slabs)


def _quantize_cpu(
    library: ctypes.CDLL,
    keys: torch.Tensor,
    values: torch.Tensor,
    hi: torch.Tensor,
    form: ZipFormat,
    out: torch.Tensor,
    slabs: torch.Tensor,
    sinks: torch.Tensor,
    sink_slabs: torch.Tensor,
) -> torch.Tensor:
    blocks, heads, tokens = slabs.shape[0], form.kv_heads, form.block_tokens
    abi.check("keys", keys, (blocks, heads, tokens, form.key_dim))
    abi.check("values", values, (blocks, heads, tokens, form.value_dim))
    abi.check("hi", hi, (blocks, tokens), torch.bool)
    keys, values, hi = keys.float(), values.float(), hi.contiguous()
    slabs, sink_slabs = slabs.contiguous(), sink_slabs.contiguous()
    status = torch.empty(blocks, dtype=torch.int32)
    missing = library.zs_quantize(
        ctypes.byref(abi.format_of(form)),
        ctypes.byref(abi.rows_of(keys)),
        ctypes.byref(abi.rows_of(values)),
        ctypes.c_void_p(hi.data_ptr()),
        ctypes.byref(abi.slabs_of(out, slabs, form.layer_bytes, blocks)),
        ctypes.byref(abi.slabs_of(sinks, sink_slabs, form.sinks_layer_bytes, blocks)),
        blocks,
        torch.get_num_threads(),
        ctypes.c_void_p(status.data_ptr()),
    )
    abi.check_slabs(missing, slabs, sink_slabs)
    return status
