"""Decode attention in Triton: splits over the sealed blocks, then a merge that goes on over the open block.

A split is one program per row and KV head. It keeps the online softmax of a group's heads, in powers of two, and
multiplies codes as they are: centred, they are half-integers, exact in float16. Products are made in float16 (of a
float32 query in float32) and summed in float32. Source: Flash-Decoding (2023).
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from zipserve.kernels import rotation
from zipserve.kernels.triton_tiles import (
    LOG2_E,
    LOWEST,
    check_words,
    layout_of,
    load_codes,
    logarithms,
    padded,
    product,
)
from zipserve.kernels.zipformat import EXPONENT_BIAS, EXPONENTS_PER_OCTAVE, SINK_TOKENS, ZipFormat

if TYPE_CHECKING:
    from zipserve.kernels.attention import OpenBlocks, RawFormat, SealedBlocks

_PROGRAMS = 512
"""About as many as fill the largest devices; fewer rows are split more."""
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_BIAS = tl.constexpr(EXPONENT_BIAS)
_PER_OCTAVE = tl.constexpr(EXPONENTS_PER_OCTAVE)
_SINKS = tl.constexpr(SINK_TOKENS)
_TILE = tl.constexpr(32)
"""Tokens at once: they fill whole words of every plane of V; more would spill registers."""


@dataclass(frozen=True)
class _Shape:
    """Compile-time constants of all three kernels; `_pad` and `lanes` are powers of two that hold what they pad."""

    kv_heads: int
    group: int
    """Query heads of a KV head."""
    lanes: int
    """For the group: rows of a product."""
    key_dim: int
    key_pad: int
    value_dim: int
    value_pad: int
    block: int
    """Tokens."""


@functools.cache
def _shape_of(form: "ZipFormat | RawFormat", group: int) -> _Shape:
    return _Shape(
        kv_heads=form.kv_heads,
        group=group,
        lanes=max(16, triton.next_power_of_2(group)),
        key_dim=form.key_dim,
        key_pad=padded(form.key_dim),
        value_dim=form.value_dim,
        value_pad=padded(form.value_dim),
        block=form.block_tokens,
    )


def decode_attention_triton(
    query: torch.Tensor,
    sealed: "SealedBlocks",
    open_blocks: "OpenBlocks",
    first: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See zipserve.kernels.attention.decode_attention.

    Raises:
        ValueError: zipped slabs that do not start at multiples of 4 bytes.
    """
    form, (rows, heads) = sealed.form, query.shape[:2]
    kv_heads, value_dim = form.kv_heads, form.value_dim
    shape = _shape_of(form, heads // kv_heads)
    query = query.contiguous()
    options = {"TYPE": _TYPES[query.dtype], "num_warps": 8 if query.dtype == torch.float32 else 4}
    splits = max(1, min(sealed.table.shape[1], triton.cdiv(_PROGRAMS, max(1, rows * kv_heads))))

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=torch.float32, device=query.device)

    partial = empty(rows, heads, splits, value_dim), empty(rows, heads, splits), empty(rows, heads, splits)
    blocks = sealed.data, sealed.data.stride(0), sealed.table, sealed.table.stride(0), sealed.counts, sealed.starts
    if isinstance(form, ZipFormat):
        check_words(sealed.data, sealed.sinks)
        half = torch.float32 if query.dtype == torch.float32 else torch.float16
        _zip_kernel[rows * kv_heads, splits](
            rotation.rotate(query), *blocks, first, sealed.sinks, sealed.sinks.stride(0), sealed.sink_slabs, *partial,
            scale, softcap, shape, layout_of(form), **options | {"TYPE": _TYPES[half]}, num_stages=2,
        )  # fmt: skip
    else:
        _raw_kernel[rows * kv_heads, splits](
            query, *blocks, first, *partial, scale, softcap, shape, _TYPES[form.dtype], **options, num_stages=2
        )
    of_sealed, of_open = empty(rows, heads, value_dim), empty(rows, heads, value_dim)
    weights = empty(rows, kv_heads, form.block_tokens) if with_weights else None
    keys, values = open_blocks.keys, open_blocks.values
    _merge_kernel[(rows * kv_heads,)](
        query, keys, *keys.stride()[:2], values, *values.stride()[:2], open_blocks.slots, open_blocks.counts,
        sealed.counts, sealed.starts, first, *partial, sink_logits, of_sealed, of_open, weights, scale, softcap,
        splits, shape, **options, num_stages=1,
    )  # fmt: skip
    if isinstance(form, ZipFormat):
        of_sealed = rotation.unrotate(of_sealed)
    return of_open.add_(of_sealed), None if weights is None else weights.sum(1) / heads


@triton.jit
def _zip_kernel(
    query, data, slab_stride, table, table_stride, counts, starts, first, sinks, sinks_stride, sink_slabs,
    partial, tops, totals, scale, softcap, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One split of zipped blocks: output (rotated, not normalized), maximum and sum of the softmax."""
    KEY_DIM: tl.constexpr = SHAPE.key_dim
    row, head = tl.program_id(0) // SHAPE.kv_heads, tl.program_id(0) % SHAPE.kv_heads
    channels = tl.arange(0, SHAPE.key_pad)
    turned = _load_query(query, SHAPE).to(tl.float32) * scale  # [lanes, key_pad]
    top, total = tl.full([SHAPE.lanes], LOWEST, tl.float32), tl.zeros([SHAPE.lanes], tl.float32)
    found = tl.zeros([SHAPE.lanes, SHAPE.value_pad], tl.float32)
    count, start, seen = tl.load(counts + row), tl.load(starts + row), tl.load(first + row)
    if (tl.program_id(1) == 0) & (start == 0) & (count > 0):
        slab = tl.load(sink_slabs + row).to(tl.int64)
        keys = (sinks + slab * sinks_stride).to(tl.pointer_type(tl.float16))
        keys += head * _SINKS * (KEY_DIM + SHAPE.value_dim)
        tokens = tl.arange(0, 16)
        visible = (tokens < _SINKS) & (tokens >= seen)
        top, total, found = _attend_to_rows(
            turned, keys, keys + _SINKS * KEY_DIM, tokens, visible, top, total, found, 1.0, softcap, SHAPE, TYPE
        )
    begin, end = _split_range(count)
    for column in range(begin, end):
        layer = data + tl.load(table + row.to(tl.int64) * table_stride + column).to(tl.int64) * slab_stride
        segment = layer + LAYOUT.bitmap_bytes + head * LAYOUT.head_bytes
        hidden_hi, hidden_lo = _hidden(layer, seen - start - column * SHAPE.block, SHAPE.block)
        if (column == 0) & (start == 0):
            hidden_hi = tl.maximum(hidden_hi, _SINKS)
        parameters = segment.to(tl.pointer_type(tl.float16)) + channels
        width = tl.load(parameters + KEY_DIM, mask=channels < KEY_DIM, other=0).to(tl.float32)  # [key_pad]
        middle = tl.load(parameters, mask=channels < KEY_DIM, other=0).to(tl.float32) + width / 2  # [key_pad]
        bias, folded = tl.sum(turned * middle[None, :], 1), turned * width[None, :]
        for of in tl.static_range(2):
            top, total, found = _attend_to_class(
                folded, bias, segment, segment + LAYOUT.exponents + of * (SHAPE.block // 2),
                hidden_lo if of else hidden_hi, top, total, found, softcap, LAYOUT.keys[of], LAYOUT.values[of], TYPE,
            )  # fmt: skip
    _store_split(partial, tops, totals, found, top, total, SHAPE)


@triton.jit
def _raw_kernel(
    query, data, slab_stride, table, table_stride, counts, starts, first, partial, tops, totals, scale, softcap,
    SHAPE: tl.constexpr, STORED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One split of raw blocks: output (not normalized), maximum and sum of the softmax."""
    row, head = tl.program_id(0) // SHAPE.kv_heads, tl.program_id(0) % SHAPE.kv_heads
    own = _load_query(query, SHAPE)  # [lanes, key_pad]
    top, total = tl.full([SHAPE.lanes], LOWEST, tl.float32), tl.zeros([SHAPE.lanes], tl.float32)
    found = tl.zeros([SHAPE.lanes, SHAPE.value_pad], tl.float32)
    hidden = tl.load(first + row) - tl.load(starts + row)
    begin, end = _split_range(tl.load(counts + row))
    for column in range(begin, end):
        layer = data + tl.load(table + row.to(tl.int64) * table_stride + column).to(tl.int64) * slab_stride
        keys = layer.to(tl.pointer_type(STORED)) + head * SHAPE.block * (SHAPE.key_dim + SHAPE.value_dim)
        values = keys + SHAPE.block * SHAPE.key_dim
        for begin_token in range(0, SHAPE.block, _TILE):
            tokens = begin_token + tl.arange(0, _TILE)
            visible = (tokens < SHAPE.block) & (column * SHAPE.block + tokens >= hidden)
            top, total, found = _attend_to_rows(
                own, keys, values, tokens, visible, top, total, found, scale, softcap, SHAPE, TYPE
            )
    _store_split(partial, tops, totals, found, top, total, SHAPE)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    query, keys, key_slot_stride, key_head_stride, values, value_slot_stride, value_head_stride, slots, open_counts,
    counts, starts, first, partial, tops, totals, sink_logits, of_sealed, of_open, weights, scale, softcap,
    splits, SHAPE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The splits of a row and KV head become one, then come the open block's tokens; the outputs of both, normalized.

    They stay apart because that of zipped blocks is rotated and that of the open block is not.
    """
    row, head = tl.program_id(0) // SHAPE.kv_heads, tl.program_id(0) % SHAPE.kv_heads
    lanes, channels = tl.arange(0, SHAPE.lanes), tl.arange(0, SHAPE.value_pad)
    valid = lanes < SHAPE.group
    inside = valid[:, None] & (channels < SHAPE.value_dim)[None, :]
    heads = tl.program_id(0).to(tl.int64) * SHAPE.group + lanes  # of all rows
    top, total = tl.full([SHAPE.lanes], LOWEST, tl.float32), tl.zeros([SHAPE.lanes], tl.float32)
    if sink_logits is not None:
        logit = tl.load(sink_logits + head * SHAPE.group + lanes, mask=valid, other=0)  # [lanes]
        top, total = logit.to(tl.float32) * LOG2_E, total + 1
    past = tl.zeros([SHAPE.lanes, SHAPE.value_pad], tl.float32)
    for split in range(splits):
        at = heads * splits + split
        split_top = tl.load(tops + at, mask=valid, other=LOWEST)  # [lanes]
        split_total = tl.load(totals + at, mask=valid, other=0)  # [lanes]
        added = tl.load(partial + at[:, None] * SHAPE.value_dim + channels[None, :], mask=inside, other=0)
        higher = tl.maximum(top, split_top)
        faded, split_faded = tl.exp2(top - higher), tl.exp2(split_top - higher)
        past = past * faded[:, None] + added * split_faded[:, None]
        top, total = higher, total * faded + split_total * split_faded
    slot, count = tl.load(slots + row).to(tl.int64), tl.load(open_counts + row)
    hidden = tl.load(first + row) - tl.load(starts + row) - tl.load(counts + row) * SHAPE.block
    own = _load_query(query, SHAPE)  # [lanes, key_pad]
    keys += slot * key_slot_stride + head * key_head_stride
    values += slot * value_slot_stride + head * value_head_stride
    found, past_top = tl.zeros([SHAPE.lanes, SHAPE.value_pad], tl.float32), top
    for begin in range(0, count, _TILE):
        tokens = begin + tl.arange(0, _TILE)
        visible = (tokens < count) & (tokens >= hidden)
        top, total, found = _attend_to_rows(
            own, keys, values, tokens, visible, top, total, found, scale, softcap, SHAPE, TYPE
        )
    at = heads[:, None] * SHAPE.value_dim + channels[None, :]
    tl.store(of_sealed + at, past * (tl.exp2(past_top - top) / total)[:, None], mask=inside)
    tl.store(of_open + at, found / total[:, None], mask=inside)
    if weights is not None:
        for begin in range(0, SHAPE.block, _TILE):
            tokens = begin + tl.arange(0, _TILE)
            visible = (tokens < count) & (tokens >= hidden)
            scores = _row_scores(own, keys, tokens, visible, scale, softcap, SHAPE.key_dim, TYPE)
            share = tl.where(valid[:, None], tl.exp2(scores - top[:, None]) / total[:, None], 0)
            places = tl.program_id(0).to(tl.int64) * SHAPE.block + tokens
            tl.store(weights + places, tl.sum(share, 0), mask=tokens < SHAPE.block)


@triton.jit
def _load_query(query, SHAPE: tl.constexpr):
    """[lanes, key_pad]: the query heads of this program's row and KV head."""
    lanes, channels = tl.arange(0, SHAPE.lanes), tl.arange(0, SHAPE.key_pad)
    at = (tl.program_id(0).to(tl.int64) * SHAPE.group + lanes[:, None]) * SHAPE.key_dim + channels[None, :]
    return tl.load(query + at, mask=(lanes < SHAPE.group)[:, None] & (channels < SHAPE.key_dim)[None, :], other=0)


@triton.jit
def _split_range(count):
    """Which of a row's `count` columns this program attends to."""
    each = tl.cdiv(count, tl.num_programs(1))
    begin = tl.program_id(1) * each
    return begin, tl.minimum(begin + each, count)


@triton.jit
def _hidden(layer, before, BLOCK: tl.constexpr):
    """How many slots of each class hold a token at a position < before: the first ones, as slots ascend in a class."""
    before = tl.minimum(tl.maximum(before, 0), BLOCK)
    tokens = tl.arange(0, triton.next_power_of_2(BLOCK))
    octets = tl.load(layer + tokens // 8, mask=tokens < before, other=0).to(tl.int32)  # [tokens]
    hi = tl.sum((octets >> (tokens % 8)) & 1)
    return hi, before - hi


@triton.jit
def _attend_to_class(
    folded, bias, segment, exponents, hidden, top, total, found, softcap,
    KEYS: tl.constexpr, VALUES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The online softmax goes on over the slots of one class of a zipped block, but for the first `hidden` ones.

    folded [lanes, key_pad]: query times widths; bias [lanes]: query times the middles of the channels.
    """
    channels = tl.arange(0, found.shape[1])
    folded = (folded * 2.0**-KEYS.bits).to(TYPE)
    for begin in range(0, KEYS.columns, _TILE):
        slots = begin + tl.arange(0, _TILE)
        codes = load_codes(segment, KEYS, 0, slots, folded.shape[1])  # [key_pad, tile]
        centred = codes.to(TYPE) - (2 ** (KEYS.bits - 1) - 0.5)
        scores = logarithms(product(folded, centred.to(TYPE)) + bias[:, None], softcap)
        scores = tl.where((slots >= hidden)[None, :], scores, -float("inf"))
        share, faded, top, total = _weigh(scores, top, total)
        powers = tl.load(exponents + slots).to(tl.float32)  # [tile]
        largest = tl.max(powers)  # keeps the weights in float16's range
        share *= tl.exp2((powers - largest) / _PER_OCTAVE)[None, :]
        codes = load_codes(segment, VALUES, begin, channels, _TILE)  # [tile, value_pad]
        centred = codes.to(TYPE) - (2 ** (VALUES.bits - 1) - 0.5)
        added = product(share.to(TYPE), centred.to(TYPE))
        found = found * faded[:, None] + added * (tl.exp2((largest - _BIAS) / _PER_OCTAVE) * VALUES.step)
    return top, total, found


@triton.jit
def _attend_to_rows(
    own, keys, values, tokens, visible, top, total, found, scale, softcap, SHAPE: tl.constexpr, TYPE: tl.constexpr
):
    """The online softmax goes on over tokens whose keys and values are rows of numbers."""
    scores = _row_scores(own, keys, tokens, visible, scale, softcap, SHAPE.key_dim, TYPE)
    share, faded, top, total = _weigh(scores, top, total)
    channels = tl.arange(0, SHAPE.value_pad)
    inside = visible[:, None] & (channels < SHAPE.value_dim)[None, :]
    at = tokens[:, None] * SHAPE.value_dim + channels[None, :]
    rows = tl.load(values + at, mask=inside, other=0)  # [tile, value_pad]
    return top, total, found * faded[:, None] + product(share.to(TYPE), rows.to(TYPE))


@triton.jit
def _row_scores(own, keys, tokens, visible, scale, softcap, KEY_DIM: tl.constexpr, TYPE: tl.constexpr):
    """Scores [lanes, tile] of tokens whose keys are rows of numbers; minus infinity for those that are not visible."""
    channels = tl.arange(0, own.shape[1])
    inside = (channels < KEY_DIM)[:, None] & visible[None, :]
    rows = tl.load(keys + tokens[None, :] * KEY_DIM + channels[:, None], mask=inside, other=0)  # [key_pad, tile]
    scores = logarithms(product(own.to(TYPE), rows.to(TYPE)) * scale, softcap)
    return tl.where(visible[None, :], scores, -float("inf"))


@triton.jit
def _weigh(scores, top, total):
    """Online softmax: the scores' weights against the new maximum, how much what is there fades, maximum and sum."""
    higher = tl.maximum(top, tl.max(scores, 1))
    share, faded = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
    return share, faded, higher, total * faded + tl.sum(share, 1)


@triton.jit
def _store_split(partial, tops, totals, found, top, total, SHAPE: tl.constexpr):
    """To partial [rows, heads, splits, value_dim] and tops, totals [rows, heads, splits]."""
    lanes, channels = tl.arange(0, SHAPE.lanes), tl.arange(0, SHAPE.value_pad)
    at = (tl.program_id(0).to(tl.int64) * SHAPE.group + lanes) * tl.num_programs(1) + tl.program_id(1)
    valid = lanes < SHAPE.group
    tl.store(tops + at, top, mask=valid)
    tl.store(totals + at, total, mask=valid)
    inside = valid[:, None] & (channels < SHAPE.value_dim)[None, :]
    tl.store(partial + at[:, None] * SHAPE.value_dim + channels[None, :], found, mask=inside)
