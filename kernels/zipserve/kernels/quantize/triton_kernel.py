"""Quantization in Triton: one program per block, KV head and 32 key channels, or 32 slots of values.

These fill whole words of every plane, so that no two programs share one. A key program needs the range of its channels
before it can encode; it rotates its tiles twice rather than keep them.
"""

import functools

import torch
import triton
import triton.language as tl

from zipserve.kernels import rotation
from zipserve.kernels.quantize.reference import NON_FINITE, OUT_OF_RANGE
from zipserve.kernels.triton_tiles import SPAN, check_words, layout_of, product, store_codes
from zipserve.kernels.zipformat import EXPONENT_BIAS, EXPONENTS_PER_OCTAVE, SINK_TOKENS, WIDTH_MIN, ZipFormat

_NON_FINITE = tl.constexpr(NON_FINITE)
_OUT_OF_RANGE = tl.constexpr(OUT_OF_RANGE)
_BIAS = tl.constexpr(EXPONENT_BIAS)
_PER_OCTAVE = tl.constexpr(EXPONENTS_PER_OCTAVE)
_SCALE_MAX = tl.constexpr(2.0 ** ((255 - EXPONENT_BIAS + 0.5) / EXPONENTS_PER_OCTAVE))
_SINKS = tl.constexpr(SINK_TOKENS)
_WIDTH_MIN = tl.constexpr(WIDTH_MIN)
_SPAN = tl.constexpr(SPAN)


def quantize_triton(
    keys: torch.Tensor,
    values: torch.Tensor,
    hi: torch.Tensor,
    form: ZipFormat,
    out: torch.Tensor,
    slabs: torch.Tensor,
    sinks: torch.Tensor,
    sink_slabs: torch.Tensor,
) -> torch.Tensor:
    """See zipserve.kernels.quantize.quantize.

    Raises:
        ValueError: slabs that do not start at multiples of 4 bytes.
    """
    check_words(out, sinks)
    order = torch.argsort((~hi).to(torch.int8), dim=1, stable=True).int()  # token of each slot
    reasons = torch.zeros(len(slabs), dtype=torch.int32, device=keys.device)
    target = order, out, out.stride(0), slabs, sinks, sinks.stride(0), sink_slabs, reasons, layout_of(form)
    programs = len(slabs) * form.kv_heads
    octets = hi.contiguous().view(torch.uint8)
    _key_kernel[programs, triton.cdiv(form.key_dim, SPAN)](
        *_rows(keys), octets, *target, STEP=_step(keys), NORM=_norm(form.key_dim)
    )
    _value_kernel[programs, form.block_tokens // SPAN](
        *_rows(values), *target, STEP=_step(values), NORM=_norm(form.value_dim)
    )
    return torch.where(reasons & NON_FINITE > 0, NON_FINITE, reasons)


def _rows(rows: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """As kernels take them: rows, strides of block, head and token, signs."""
    return rows, *rows.stride()[:3], _signs(rows.shape[-1], rows.dtype, rows.device)


@functools.cache
def _signs(dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The rotation without its factor: 1, -1 and 0, with which products are exact in any dtype."""
    return (rotation.matrix(dim, device) / _norm(dim)).round().to(dtype)


def _norm(dim: int) -> float:
    """The rotation's factor."""
    return float((dim & -dim) ** -0.5)


def _step(rows: torch.Tensor) -> int:
    """Channels that a rotation takes at once: a power of two that divides them; float32 takes more registers."""
    dim = rows.shape[-1]
    return min(16 if rows.dtype == torch.float32 else 64, dim & -dim)


@triton.jit
def _key_kernel(
    keys, block_stride, head_stride, token_stride, signs, hi, order, out, slab_stride, slabs, sinks, sinks_stride,
    sink_slabs, reasons, LAYOUT: tl.constexpr, STEP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """32 channels of a head's keys; and the bitmap."""
    DIM: tl.constexpr = LAYOUT.key_dim
    HALF: tl.constexpr = LAYOUT.block // 2
    block, head = (tl.program_id(0) // LAYOUT.kv_heads).to(tl.int64), tl.program_id(0) % LAYOUT.kv_heads
    begin = tl.program_id(1) * _SPAN
    channels = begin + tl.arange(0, _SPAN)
    valid = channels < DIM
    keys += block * block_stride + head * head_stride
    order += block * LAYOUT.block
    layer = out + tl.load(slabs + block) * slab_stride
    segment = layer + LAYOUT.bitmap_bytes + head * LAYOUT.head_bytes
    if (head == 0) & (begin == 0):
        _store_bitmap(layer, hi + block * LAYOUT.block, LAYOUT.bitmap_bytes)
    sink_slab = tl.load(sink_slabs + block)
    kept = (sinks + sink_slab * sinks_stride).to(tl.pointer_type(tl.float16))
    kept += head * _SINKS * (DIM + LAYOUT.value_dim)
    count = tl.where(sink_slab < 0, 0, _SINKS)  # of sinks

    least, greatest = tl.full([_SPAN], float("inf"), tl.float32), tl.full([_SPAN], -float("inf"), tl.float32)
    finite = 1
    for first in range(0, LAYOUT.block, _SPAN):
        slots = first + tl.arange(0, _SPAN)
        tile = tl.trans(_rotated(keys, token_stride, order + slots, signs, channels, DIM, STEP) * NORM)
        finite &= _all(_is_finite(tile))
        ranged = (slots >= count)[None, :]
        least = tl.minimum(least, tl.min(tl.where(ranged, tile, float("inf")), 1))
        greatest = tl.maximum(greatest, tl.max(tl.where(ranged, tile, -float("inf")), 1))
    lo = least.to(tl.float16)
    width = tl.maximum(greatest - lo.to(tl.float32), _WIDTH_MIN).to(tl.float16)
    parameters = segment.to(tl.pointer_type(tl.float16)) + channels
    tl.store(parameters, lo, mask=valid)
    tl.store(parameters + DIM, width, mask=valid)
    fits = _all(_is_finite(lo) & _is_finite(width))

    for of in tl.static_range(2):
        for first in range(0, HALF, _SPAN):
            slots = first + tl.arange(0, _SPAN)
            tokens = order + of * HALF + slots
            tile = tl.trans(_rotated(keys, token_stride, tokens, signs, channels, DIM, STEP) * NORM)  # [channels, SPAN]
            cells = (tile - lo.to(tl.float32)[:, None]) * 2 ** LAYOUT.keys[of].bits / width.to(tl.float32)[:, None]
            codes = tl.clamp(tl.floor(cells), 0.0, 2.0 ** LAYOUT.keys[of].bits - 1).to(tl.int32)
            store_codes(segment, LAYOUT.keys[of], begin, slots, tl.where(valid[:, None], codes, 0))
            if of == 0:
                is_sink = valid[:, None] & (slots < count)[None, :]
                tl.store(kept + slots[None, :] * DIM + channels[:, None], tile.to(tl.float16), mask=is_sink)
                fits &= _all(_is_finite(tile.to(tl.float16)) | ~is_sink)
    tl.atomic_or(reasons + block, (1 - finite) * _NON_FINITE + (1 - fits) * _OUT_OF_RANGE)


@triton.jit
def _value_kernel(
    values, block_stride, head_stride, token_stride, signs, order, out, slab_stride, slabs, sinks, sinks_stride,
    sink_slabs, reasons, LAYOUT: tl.constexpr, STEP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """32 slots of a head's values, and their exponents."""
    DIM: tl.constexpr = LAYOUT.value_dim
    HALF: tl.constexpr = LAYOUT.block // 2
    block, head = (tl.program_id(0) // LAYOUT.kv_heads).to(tl.int64), tl.program_id(0) % LAYOUT.kv_heads
    begin = tl.program_id(1) * _SPAN
    slots, channels = begin + tl.arange(0, _SPAN), tl.arange(0, LAYOUT.value_pad)
    values += block * block_stride + head * head_stride
    tokens = order + block * LAYOUT.block + slots
    tile = _rotated(values, token_stride, tokens, signs, channels, DIM, STEP) * NORM  # [SPAN, value_pad]
    segment = out + tl.load(slabs + block) * slab_stride + LAYOUT.bitmap_bytes + head * LAYOUT.head_bytes
    if begin < HALF:
        exponents, fits = _encode_values(segment, LAYOUT.values[0], begin, tile)
    else:
        exponents, fits = _encode_values(segment, LAYOUT.values[1], begin - HALF, tile)
    tl.store(segment + LAYOUT.exponents + slots, exponents)
    sink_slab = tl.load(sink_slabs + block)
    kept = (sinks + sink_slab * sinks_stride).to(tl.pointer_type(tl.float16))
    kept += head * _SINKS * (LAYOUT.key_dim + DIM) + _SINKS * LAYOUT.key_dim
    is_sink = (slots < tl.where(sink_slab < 0, 0, _SINKS))[:, None] & (channels < DIM)[None, :]
    tl.store(kept + slots[:, None] * DIM + channels[None, :], tile.to(tl.float16), mask=is_sink)
    fits &= _all(_is_finite(tile.to(tl.float16)) | ~is_sink)
    tl.atomic_or(reasons + block, (1 - _all(_is_finite(tile))) * _NON_FINITE + (1 - fits) * _OUT_OF_RANGE)


@triton.jit
def _encode_values(segment, CODES: tl.constexpr, first, tile):
    """Stores the codes of rotated values [SPAN, value_pad].

    Returns their exponents, uint8 [SPAN], and whether these can hold the scales, 1 or 0.
    """
    channels = tl.arange(0, tile.shape[1])
    squares = tl.sum(tile * tile, 1)
    cell = tl.sqrt(squares / CODES.columns) * CODES.step
    index = tl.floor(tile / tl.maximum(cell, 1e-30)[:, None])
    index = tl.clamp(index, -(2.0 ** (CODES.bits - 1)), 2.0 ** (CODES.bits - 1) - 1)
    codes = (index + 2 ** (CODES.bits - 1)).to(tl.int32)
    store_codes(segment, CODES, first, channels, tl.where((channels < CODES.columns)[None, :], codes, 0))
    # Unbiased: <x, x'> = |x|^2, so that nothing is shrunk on average. The padding of `tile` is 0.
    scales = squares / tl.maximum(tl.sum(tile * (index + 0.5) * CODES.step, 1), 1e-30)
    exponents = tl.floor(tl.log2(tl.maximum(scales, 1e-30)) * _PER_OCTAVE + (_BIAS + 0.5))
    exponents = tl.where(squares > 0, tl.clamp(exponents, 0.0, 255.0), 0.0)
    return exponents.to(tl.uint8), _all(scales <= _SCALE_MAX)


@triton.jit
def _rotated(rows, stride, tokens, signs, channels, DIM: tl.constexpr, STEP: tl.constexpr):
    """Rotated rows but for the factor: float32 [n, channels], 0 from channel DIM on. tokens: pointers [n] to int32."""
    places = tl.load(tokens).to(tl.int64)[:, None] * stride
    found = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32)
    for first in range(0, DIM, STEP):
        inner = first + tl.arange(0, STEP)
        tile = tl.load(rows + places + inner[None, :])  # [n, STEP]
        inside = (channels < DIM)[None, :]
        turn = tl.load(signs + inner[:, None] * DIM + channels[None, :], mask=inside, other=0)  # [STEP, channels]
        found += product(tile, turn)
    return found


@triton.jit
def _store_bitmap(layer, hi, BYTES: tl.constexpr):
    octets, bits = tl.arange(0, triton.next_power_of_2(BYTES)), tl.arange(0, 8)
    inside = octets < BYTES
    flags = tl.load(hi + octets[:, None] * 8 + bits[None, :], mask=inside[:, None], other=0).to(tl.int32)  # [octets, 8]
    tl.store(layer + octets, tl.sum(flags << bits[None, :], 1).to(tl.uint8), mask=inside)


@triton.jit
def _is_finite(tile):
    return tl.abs(tile.to(tl.float32)) < float("inf")


@triton.jit
def _all(flags):
    """1 or 0."""
    return tl.min(flags.to(tl.int32))
