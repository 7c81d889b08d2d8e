"""Dequantization in Triton: one program per block, KV head and 32 slots; one matrix product undoes the rotation."""

import torch
import triton
import triton.language as tl

from zipserve.kernels import rotation
from zipserve.kernels.triton_tiles import SPAN, check_words, layout_of, load_codes
from zipserve.kernels.zipformat import EXPONENT_BIAS, EXPONENTS_PER_OCTAVE, SINK_TOKENS, ZipFormat

_BIAS = tl.constexpr(EXPONENT_BIAS)
_PER_OCTAVE = tl.constexpr(EXPONENTS_PER_OCTAVE)
_SINKS = tl.constexpr(SINK_TOKENS)
_SPAN = tl.constexpr(SPAN)


def dequantize_triton(
    blocks: torch.Tensor, slabs: torch.Tensor, form: ZipFormat, sinks: torch.Tensor, sink_slabs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See zipserve.kernels.dequantize.dequantize.

    Raises:
        ValueError: slabs that do not start at multiples of 4 bytes.
    """
    check_words(blocks, sinks)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    hi = (blocks[slabs, : form.bitmap_bytes, None] >> shifts & 1).flatten(1)
    order = torch.argsort(hi, dim=1, descending=True, stable=True).int()  # token of each slot
    shape = len(slabs), form.kv_heads, form.block_tokens
    keys = torch.empty(*shape, form.key_dim, dtype=torch.float32, device=blocks.device)
    values = torch.empty(*shape, form.value_dim, dtype=torch.float32, device=blocks.device)
    _dequantize_kernel[len(slabs) * form.kv_heads, form.block_tokens // SPAN](
        blocks, blocks.stride(0), slabs, order, sinks, sinks.stride(0), sink_slabs, keys, values, layout_of(form)
    )
    return rotation.unrotate(keys), rotation.unrotate(values)


@triton.jit
def _dequantize_kernel(
    data, slab_stride, slabs, order, sinks, sinks_stride, sink_slabs, keys, values, LAYOUT: tl.constexpr
):
    """32 slots of a head's keys and values, still rotated, to their tokens' places."""
    KEY_DIM: tl.constexpr = LAYOUT.key_dim
    VALUE_DIM: tl.constexpr = LAYOUT.value_dim
    HALF: tl.constexpr = LAYOUT.block // 2
    block, head = (tl.program_id(0) // LAYOUT.kv_heads).to(tl.int64), tl.program_id(0) % LAYOUT.kv_heads
    begin = tl.program_id(1) * _SPAN
    slots = begin + tl.arange(0, _SPAN)
    tokens = tl.load(order + block * LAYOUT.block + slots)  # [SPAN]
    rows = tl.program_id(0).to(tl.int64) * LAYOUT.block + tokens
    segment = data + tl.load(slabs + block) * slab_stride + LAYOUT.bitmap_bytes + head * LAYOUT.head_bytes
    sink_slab = tl.load(sink_slabs + block)
    kept = (sinks + sink_slab * sinks_stride).to(tl.pointer_type(tl.float16)) + head * _SINKS * (KEY_DIM + VALUE_DIM)
    is_sink = slots < tl.where(sink_slab < 0, 0, _SINKS)
    if begin < HALF:
        key_tile = _keys(segment, LAYOUT, LAYOUT.keys[0], begin)
        value_tile = _values(segment, LAYOUT, LAYOUT.values[0], begin, slots)
    else:
        key_tile = _keys(segment, LAYOUT, LAYOUT.keys[1], begin - HALF)
        value_tile = _values(segment, LAYOUT, LAYOUT.values[1], begin - HALF, slots)
    _store_rows(keys, tl.trans(key_tile), rows, kept, slots, is_sink, KEY_DIM)
    _store_rows(values, value_tile, rows, kept + _SINKS * KEY_DIM, slots, is_sink, VALUE_DIM)


@triton.jit
def _keys(segment, LAYOUT: tl.constexpr, CODES: tl.constexpr, first):
    """Keys float32 [key_pad, SPAN] of a class, from its slot `first` on."""
    channels = tl.arange(0, LAYOUT.key_pad)
    parameters = segment.to(tl.pointer_type(tl.float16)) + channels
    lo = tl.load(parameters, mask=channels < LAYOUT.key_dim, other=0).to(tl.float32)  # [key_pad]
    width = tl.load(parameters + LAYOUT.key_dim, mask=channels < LAYOUT.key_dim, other=0).to(tl.float32)  # [key_pad]
    codes = load_codes(segment, CODES, 0, first + tl.arange(0, _SPAN), LAYOUT.key_pad)
    return lo[:, None] + (codes.to(tl.float32) + 0.5) * (width / 2**CODES.bits)[:, None]


@triton.jit
def _values(segment, LAYOUT: tl.constexpr, CODES: tl.constexpr, first, slots):
    """Values float32 [SPAN, value_pad] of a class, from its slot `first` on; slots [SPAN]: of the block."""
    codes = load_codes(segment, CODES, first, tl.arange(0, LAYOUT.value_pad), _SPAN)
    exponents = tl.load(segment + LAYOUT.exponents + slots).to(tl.float32)  # [SPAN]
    scales = tl.exp2((exponents - _BIAS) / _PER_OCTAVE)
    return (codes.to(tl.float32) - (2 ** (CODES.bits - 1) - 0.5)) * CODES.step * scales[:, None]


@triton.jit
def _store_rows(out, tile, rows, kept, slots, is_sink, DIM: tl.constexpr):
    """tile [SPAN, pad] to the rows of out [.., DIM]; but sinks are those of kept [SINKS, DIM]."""
    channels = tl.arange(0, tile.shape[1])
    inside = (channels < DIM)[None, :]
    sink = tl.load(kept + slots[:, None] * DIM + channels[None, :], mask=is_sink[:, None] & inside, other=0)
    tl.store(
        out + rows[:, None] * DIM + channels[None, :], tl.where(is_sink[:, None], sink.to(tl.float32), tile), inside
    )
