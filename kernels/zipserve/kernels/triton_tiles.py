"""What the Triton kernels share: the `zip` format's layout as constants, words to codes and back, scores.

A tile of codes is [contracted, free]: channels × tokens for keys, tokens × channels for values, as the words are.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from zipserve.kernels.zipformat import VALUE_STEPS, Region, ZipFormat

LOG2_E = tl.constexpr(1.4426950408889634)
"""Scores are kept as logarithms to base 2."""
LOWEST = tl.constexpr(-1e30)
"""Where a maximum of scores begins; finite, so that a row that sees no key gets weights of 0 and not NaN."""
SPAN = 32
"""Contracted elements that fill whole words of every plane: the least tile."""


@dataclass(frozen=True)
class Codes:
    """One region of codes. Triton's cache tells constants apart by their repr, hence numbers and no properties."""

    offset: int
    """Bytes from the start of the head's segment."""
    bits: int
    elements: int
    """Along the contracted axis."""
    columns: int
    """Words of a row."""
    step: float
    """Width of a cell of values, in units of the row's root mean square."""


@dataclass(frozen=True)
class Layout:
    """One layer of a block, for one compiled kernel."""

    kv_heads: int
    key_dim: int
    value_dim: int
    block: int
    """Tokens."""
    bitmap_bytes: int
    head_bytes: int
    exponents: int
    """Offset in a head's segment, in bytes."""
    keys: tuple[Codes, Codes]
    """Of the hi and the lo class, as below."""
    values: tuple[Codes, Codes]
    key_pad: int
    """Power of two that holds the channels."""
    value_pad: int


@functools.cache
def layout_of(form: ZipFormat) -> Layout:
    """The constants of a format."""
    (key_hi, key_lo), (value_hi, value_lo) = form.keys, form.values
    return Layout(
        kv_heads=form.kv_heads,
        key_dim=form.key_dim,
        value_dim=form.value_dim,
        block=form.block_tokens,
        bitmap_bytes=form.bitmap_bytes,
        head_bytes=form.head_bytes,
        exponents=form.exponent_offset,
        keys=(_codes(key_hi), _codes(key_lo)),
        values=(_codes(value_hi), _codes(value_lo)),
        key_pad=padded(form.key_dim),
        value_pad=padded(form.value_dim),
    )


def _codes(region: Region) -> Codes:
    elements = region.dim if region.is_key else region.tokens
    return Codes(region.offset, region.bits, elements, region.columns, VALUE_STEPS[region.bits])


def padded(dim: int) -> int:
    """The power of two that holds `dim` channels and whole words of them."""
    return max(SPAN, 1 << (dim - 1).bit_length())


def check_words(*slabs: torch.Tensor) -> None:
    """That the kernels can read slabs [n, bytes] as 32-bit words.

    Raises:
        ValueError: they start between words.
    """
    for data in slabs:
        if data.data_ptr() % 4 or data.stride(0) % 4:
            raise ValueError(f"slabs must start at multiples of 4 bytes, not at {data.data_ptr()} + {data.stride(0)} i")


@triton.jit
def load_codes(segment, CODES: tl.constexpr, first, columns, TILE: tl.constexpr):
    """Codes int32 [TILE, columns], from contracted element `first` on, a multiple of 32; 0 outside of the region.

    segment: uint8 pointer to a head's segment; columns: int32 [n].
    """
    words = (segment + CODES.offset).to(tl.pointer_type(tl.int32))
    if CODES.bits == 3:
        upper = _load_plane(words, CODES, 2, first, columns, TILE)
        lowest = words + (CODES.elements + 15) // 16 * CODES.columns
        codes = (upper << 1) | _load_plane(lowest, CODES, 1, first, columns, TILE)
    else:
        codes = _load_plane(words, CODES, CODES.bits, first, columns, TILE)
    return codes


@triton.jit
def _load_plane(words, CODES: tl.constexpr, BITS: tl.constexpr, first, columns, TILE: tl.constexpr):
    PER_WORD: tl.constexpr = 32 // BITS
    rows = first // PER_WORD + tl.arange(0, TILE // PER_WORD)
    inside = (rows * PER_WORD < CODES.elements)[:, None] & (columns < CODES.columns)[None, :]
    packed = tl.load(words + rows[:, None] * CODES.columns + columns[None, :], mask=inside, other=0)  # [rows, columns]
    places = BITS * tl.arange(0, PER_WORD)
    codes = (packed[:, None, :] >> places[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [TILE, columns.shape[0]])


@triton.jit
def store_codes(segment, CODES: tl.constexpr, first, columns, codes):
    """The reverse of load_codes for codes [TILE, columns], which must be 0 outside of the region."""
    words = (segment + CODES.offset).to(tl.pointer_type(tl.int32))
    if CODES.bits == 3:
        _store_plane(words, CODES, 2, first, columns, codes >> 1)
        lowest = words + (CODES.elements + 15) // 16 * CODES.columns
        _store_plane(lowest, CODES, 1, first, columns, codes & 1)
    else:
        _store_plane(words, CODES, CODES.bits, first, columns, codes)


@triton.jit
def _store_plane(words, CODES: tl.constexpr, BITS: tl.constexpr, first, columns, codes):
    PER_WORD: tl.constexpr = 32 // BITS
    ROWS: tl.constexpr = codes.shape[0] // PER_WORD
    rows = first // PER_WORD + tl.arange(0, ROWS)
    places = BITS * tl.arange(0, PER_WORD)
    packed = tl.sum(tl.reshape(codes, [ROWS, PER_WORD, columns.shape[0]]) << places[None, :, None], 1)
    inside = (rows * PER_WORD < CODES.elements)[:, None] & (columns < CODES.columns)[None, :]
    tl.store(words + rows[:, None] * CODES.columns + columns[None, :], packed, mask=inside)


@triton.jit
def product(a, b):
    """a b, summed in float32; as exact as float32 for float32 matrices too: on CUDA by three products in TF32."""
    return tl.dot(a, b, input_precision="tf32x3" if is_cuda() else "ieee")


@triton.jit
def logarithms(products, softcap):
    """Scores as logarithms to base 2, capped: softcap * tanh(products / softcap), if there is a softcap."""
    if softcap is not None:
        products = softcap * (2 * tl.sigmoid(2 * products / softcap) - 1)
    return products * LOG2_E
