"""The definition of the zip codec's decoder, in PyTorch."""

import torch

from zipserve.kernels import rotation
from zipserve.kernels.zipformat import (
    EXPONENT_BIAS,
    EXPONENTS_PER_OCTAVE,
    SINK_TOKENS,
    VALUE_STEPS,
    Region,
    ZipFormat,
)


def dequantize_reference(
    blocks: torch.Tensor, slabs: torch.Tensor, form: ZipFormat, sinks: torch.Tensor, sink_slabs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See zipserve.kernels.dequantize.dequantize."""
    keys = torch.empty(len(slabs), form.kv_heads, form.block_tokens, form.key_dim, device=blocks.device)
    values = torch.empty(len(slabs), form.kv_heads, form.block_tokens, form.value_dim, device=blocks.device)
    for block, slab in enumerate(slabs.tolist()):
        sink_slab = int(sink_slabs[block])
        keys[block], values[block] = decode_block(
            blocks[slab].contiguous(), form, sinks[sink_slab].contiguous() if sink_slab >= 0 else None
        )
    return rotation.unrotate(keys), rotation.unrotate(values)


def decode_block(data: torch.Tensor, form: ZipFormat, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer of one block, still rotated, in the order of positions.

    Args:
        data: uint8 [layer_bytes].
        sinks: uint8 [sinks_layer_bytes] for a block that starts at position 0, else None.

    Returns:
        float32 [kv_heads, block_tokens, key_dim] and [kv_heads, block_tokens, value_dim].
    """
    shifts = torch.arange(8, device=data.device)
    hi = ((data[: form.bitmap_bytes, None].long() >> shifts) & 1).flatten().bool()
    order = torch.argsort((~hi).to(torch.int8), stable=True)
    keys = torch.empty(form.kv_heads, form.block_tokens, form.key_dim, device=data.device)
    values = torch.empty(form.kv_heads, form.block_tokens, form.value_dim, device=data.device)
    for head in range(form.kv_heads):
        start = form.head_offset(head)
        segment = data[start : start + form.head_bytes]
        keys[head, order], values[head, order] = _keys(segment, form), _values(segment, form)
    if sinks is not None:
        heads = sinks.view(torch.float16).view(form.kv_heads, -1).float()
        border = SINK_TOKENS * form.key_dim
        keys[:, :SINK_TOKENS] = heads[:, :border].reshape(form.kv_heads, SINK_TOKENS, form.key_dim)
        values[:, :SINK_TOKENS] = heads[:, border:].reshape(form.kv_heads, SINK_TOKENS, form.value_dim)
    return keys, values


def unpack(segment: torch.Tensor, region: Region) -> torch.Tensor:
    """Codes int64 [tokens, dim] of a region of a head's segment: the reverse of `pack`."""
    contracted = region.dim if region.is_key else region.tokens
    codes = torch.zeros(contracted, region.columns, dtype=torch.int64, device=segment.device)
    for bits, at, rows in region.planes:
        octets = segment[at : at + 4 * rows * region.columns].long().view(rows, region.columns, 4)
        words = (octets << (8 * torch.arange(4, device=segment.device))).sum(-1)
        places = bits * torch.arange(32 // bits, device=segment.device)[None, :, None]
        plane = (words[:, None] >> places) & ((1 << bits) - 1)
        codes = (codes << bits) | plane.reshape(-1, region.columns)[:contracted]
    return codes.T if region.is_key else codes


def _keys(segment: torch.Tensor, form: ZipFormat) -> torch.Tensor:
    """[slots, key_dim]: lo + (code + 1/2) width / 2^b."""
    parameters = segment[: 4 * form.key_dim].view(torch.float16).float()
    lo, width = parameters[: form.key_dim], parameters[form.key_dim :]
    return torch.cat([lo + (unpack(segment, region) + 0.5) * (width / 2**region.bits) for region in form.keys])


def _values(segment: torch.Tensor, form: ZipFormat) -> torch.Tensor:
    """[slots, value_dim]: (code - 2^(b-1) + 1/2) ST_b 2^((e - 160) / 8)."""
    exponents = segment[form.exponent_offset : form.exponent_offset + form.block_tokens].float()
    scales = torch.exp2((exponents - EXPONENT_BIAS) / EXPONENTS_PER_OCTAVE)
    cells = [
        (unpack(segment, region) - (1 << (region.bits - 1)) + 0.5) * VALUE_STEPS[region.bits] for region in form.values
    ]
    return torch.cat(cells) * scales[:, None]
