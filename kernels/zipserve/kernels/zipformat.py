"""The `zip` format: what one layer of a sealed block looks like in bytes. Derived from ZipCache (2024); version 1.

A block is `block_tokens` consecutive tokens. Half of them, the `hi` class, are those with the highest saliency; the
others are `lo`. Inside a block tokens stand in slots: the hi class first, ascending positions inside a class. Keys
carry their rotary phase, so attention needs no order; a bitmap restores it.

One layer:  bitmap | per KV head: lo[Dk] width[Dk] | K codes hi | K codes lo | V exponents | V codes hi | V codes lo

    bitmap      block_tokens / 8 bytes; bit t (least significant first) says that the token at position t is hi
    lo, width   float16: minimum and width of each key channel, of both classes, sinks left out
    exponents   one byte a slot: the scale of its values is 2^((e - 160) / 8)
    codes       32-bit little-endian words, element i of a word at bits i * b. K words hold consecutive channels of one
                token, [channels / c][tokens]; V words hold consecutive tokens of one channel, [tokens / c][channels];
                c = 32 / b. 3 bits are two planes, one after the other: the codes' upper two bits, then the lowest ones.

Everything is in a rotated domain (`zipserve.kernels.rotation`). The first SINK_TOKENS tokens of a sequence are kept in
float16 beside block 0, in a sinks slab of their own, per layer and KV head: K [SINK_TOKENS, Dk], then V. In block 0
they occupy the first slots of the hi class, which readers skip.

No torch here: the wire and the stores derive sizes from this too.
"""

from dataclasses import dataclass
from functools import cache, cached_property

FORMAT_VERSION = 1
"""Part of every zip layout's fingerprint: it changes with anything here, the rotation or the probe rows."""
SINK_TOKENS = 4
BLOCK_TOKENS_MULTIPLE = 64
"""So that each class fills whole words of every plane of V."""
HEAD_DIM_MULTIPLE = 16
EXPONENT_BIAS = 160
EXPONENTS_PER_OCTAVE = 8
WIDTH_MIN = 1e-4
"""Least width of a key channel, so that a constant channel has one."""
VALUE_STEPS = {2: 0.996, 3: 0.586, 4: 0.3352}
"""Width of a cell of the values' quantizer, by bits, in units of the row's root mean square."""
PLANES = {2: (2,), 3: (2, 1), 4: (4,)}
"""Bits of each plane of codes, by the codes' bits; upper bits first."""


@dataclass(frozen=True)
class Profile:
    """Bits of each class."""

    key_hi: int
    key_lo: int
    value_hi: int
    value_lo: int

    @property
    def has_classes(self) -> bool:
        """Whether hi and lo differ at all; if not, tokens keep their order and no saliency is needed."""
        return (self.key_hi, self.value_hi) != (self.key_lo, self.value_lo)


PROFILES = {
    "4/4": Profile(4, 4, 4, 4),
    "4/3": Profile(4, 4, 3, 3),
    "4/32": Profile(4, 4, 3, 2),
    "43/32": Profile(4, 3, 3, 2),
    "4/2": Profile(4, 4, 2, 2),
    "3/2": Profile(3, 3, 2, 2),
}
"""By name: K bits / V bits, two digits where hi and lo differ."""


@dataclass(frozen=True)
class Region:
    """Codes of one class, of keys or of values: where they start in a head's segment, and their shape."""

    offset: int
    """Bytes from the start of the head's segment."""
    bits: int
    tokens: int
    dim: int
    is_key: bool

    @property
    def planes(self) -> list[tuple[int, int, int]]:
        """Of each plane: its bits, its offset in the head's segment in bytes, and its rows of words."""
        found, at = [], self.offset
        for bits in PLANES[self.bits]:
            rows = _words(self.dim if self.is_key else self.tokens, bits)
            found.append((bits, at, rows))
            at += 4 * rows * self.columns
        return found

    @property
    def columns(self) -> int:
        """Words of a row: tokens for keys, channels for values."""
        return self.tokens if self.is_key else self.dim

    @property
    def end(self) -> int:
        """Offset of the first byte after the region."""
        _, at, rows = self.planes[-1]
        return at + 4 * rows * self.columns


@dataclass(frozen=True)
class ZipFormat:
    """Sizes and offsets for one shape of KV.

    Raises:
        ValueError: a shape or profile that the format does not know; the message names limit and value.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    block_tokens: int = 128
    profile: str = "4/32"

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"zip profile {self.profile!r} is unknown; known: {', '.join(PROFILES)}")
        for name, value, multiple in (
            ("block_tokens", self.block_tokens, BLOCK_TOKENS_MULTIPLE),
            ("key_dim", self.key_dim, HEAD_DIM_MULTIPLE),
            ("value_dim", self.value_dim, HEAD_DIM_MULTIPLE),
        ):
            if value <= 0 or value % multiple:
                raise ValueError(f"the zip format needs a {name} that is a multiple of {multiple}, not {value}")

    @property
    def bits(self) -> Profile:
        """Bits of each class."""
        return PROFILES[self.profile]

    @property
    def hi_tokens(self) -> int:
        """Tokens of the hi class."""
        return self.block_tokens // 2

    @property
    def bitmap_bytes(self) -> int:
        """Size of the class bitmap, which stands at the start of a layer."""
        return self.block_tokens // 8

    @property
    def width_offset(self) -> int:
        """Of the key channels' widths in a head's segment; their minima stand at 0."""
        return 2 * self.key_dim

    @cached_property
    def keys(self) -> tuple[Region, Region]:
        """Regions of the keys' codes, hi and lo."""
        return self._regions(4 * self.key_dim, self.bits.key_hi, self.bits.key_lo, is_key=True)

    @property
    def exponent_offset(self) -> int:
        """Of the values' exponents, uint8 [block_tokens] in the order of slots, in a head's segment."""
        return self.keys[1].end

    @cached_property
    def values(self) -> tuple[Region, Region]:
        """Regions of the values' codes, hi and lo."""
        start = self.exponent_offset + self.block_tokens
        return self._regions(start, self.bits.value_hi, self.bits.value_lo, is_key=False)

    @property
    def head_bytes(self) -> int:
        """Size of one head's segment."""
        return self.values[1].end

    def head_offset(self, head: int) -> int:
        """Of a head's segment in a layer."""
        return self.bitmap_bytes + head * self.head_bytes

    @cached_property
    def layer_bytes(self) -> int:
        """Size of one layer of a block."""
        return self.head_offset(self.kv_heads)

    @property
    def sinks_layer_bytes(self) -> int:
        """Size of one layer of a sinks slab."""
        return self.kv_heads * SINK_TOKENS * (self.key_dim + self.value_dim) * 2

    def _regions(self, start: int, hi_bits: int, lo_bits: int, *, is_key: bool) -> tuple[Region, Region]:
        dim = self.key_dim if is_key else self.value_dim
        hi = Region(start, hi_bits, self.hi_tokens, dim, is_key)
        return hi, Region(hi.end, lo_bits, self.block_tokens - self.hi_tokens, dim, is_key)


def probe_offsets(block_tokens: int) -> list[int]:
    """Positions inside of a block whose attention rows decide the classes: the last ones and as many others, 11 %.

    They are fixed, so that a block's bytes can be made again: 7 + 7 for a block of 128 tokens.
    """
    count = max(1, round(block_tokens * 7 / 128))
    step = (block_tokens - count) // count
    return [*(step // 6 + 1 + step * i for i in range(count)), *range(block_tokens - count, block_tokens)]


@cache
def probe_counts(block_tokens: int) -> tuple[int, ...]:
    """For each position of a block how many probe rows can see it: the divisor that normalizes its score."""
    probes = probe_offsets(block_tokens)
    return tuple(sum(probe >= position for probe in probes) for position in range(block_tokens))


def _words(elements: int, bits: int) -> int:
    return -(-elements * bits // 32)
