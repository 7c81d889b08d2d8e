"""What fixes a slab's bytes, and where every part of it lies.

A slab is `[header | payload]`, and a payload is one record per layer, each a row of typed fields (`Field`). There are
three kinds: blocks, tails, and, for codecs that keep the first tokens of a sequence apart, sinks. All offsets of wire
and stores derive from here; those inside a zipped layer from `zipserve.kernels.zipformat`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import cached_property
from math import prod

from zipserve.common.errors import LayoutMismatchError
from zipserve.kernels.zipformat import FORMAT_VERSION, PROFILES, SINK_TOKENS, ZipFormat

LAYOUT_VERSION = 2
HEADER_BYTES = 128
SLAB_ALIGNMENT_BYTES = 4096
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
MODEL_DTYPES = ("float32", "float16", "bfloat16")
CODECS = ("raw", "int8", "int4", "zipcache", *(f"zip-{profile}" for profile in PROFILES))
DEFAULT_CODEC = "zip-4/32"
ZIPCACHE_SALIENT_SHARE = 0.6
"""Of a block's tokens, those with 4 bits in `zipcache`: the published setting."""


class SlabKind(IntEnum):
    """What a slab holds; the numbers are those of zipserve.v1.SlabKind."""

    BLOCK = 1
    TAIL = 2
    SINKS = 3


@dataclass(frozen=True)
class Field:
    """A part of one layer's record: `shape` elements of `dtype`, contiguous. Wider types stand before narrower ones."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the field."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """Everything that two workers must agree on before any KV byte moves.

    Raises:
        LayoutMismatchError: for an unknown codec or dtype, or a shape that the codec cannot code.
    """

    model: str
    revision: str
    """Hash of weights and configuration."""
    layers: int
    kv_heads: int
    """KV heads of this rank."""
    key_dim: int
    value_dim: int
    dtype: str
    """Of the model's activations: float32, float16 or bfloat16."""
    codec: str = "raw"
    """`raw`: as computed. `int8`, `int4`: uniform per token and head. `zipcache`: ZipCache as published, per block.
    `zip-PROFILE`: ours, see zipserve.kernels.zipformat."""
    block_tokens: int = 128
    rank: int = 0
    ranks: int = 1
    """Tensor-parallel rank and degree."""
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise LayoutMismatchError(f"codec {self.codec!r} is unknown; known: {', '.join(CODECS)}")
        if self.dtype not in MODEL_DTYPES:
            raise LayoutMismatchError(f"dtype {self.dtype!r} is unknown; known: {', '.join(MODEL_DTYPES)}")
        problem = None
        if self.codec != "raw" and (self.key_dim % 8 or self.value_dim % 8):
            problem = f"it needs head dimensions that are multiples of 8, not {self.key_dim} and {self.value_dim}"
        elif self.codec != "raw" and self.block_tokens % 16:
            problem = f"it needs a block_tokens that is a multiple of 16, not {self.block_tokens}"
        try:
            _ = self.zip_format
        except ValueError as error:
            problem = str(error)
        if problem:
            raise LayoutMismatchError(f"codec {self.codec} cannot code this model: {problem}; codec raw can")

    @cached_property
    def fingerprint(self) -> bytes:
        """sha256 over all fields, and for zip codecs the version of their format; 32 bytes."""
        form = {"zip_format": FORMAT_VERSION} if self.zip_format else {}
        return hashlib.sha256(json.dumps({**asdict(self), **form}, sort_keys=True).encode()).digest()

    @property
    def description(self) -> str:
        """Readable form, for logs and errors."""
        return (
            f"{self.model}@{self.revision[:12]} {self.layers} layers x {self.kv_heads} heads x "
            f"{self.key_dim}/{self.value_dim} {self.dtype} {self.codec} block {self.block_tokens} "
            f"rank {self.rank}/{self.ranks} v{self.version}"
        )

    @property
    def precision(self) -> str:
        """Of the codes of a sealed block, for people: a dtype, bits, or bits of keys and of values (`4/32`)."""
        return self.precision_of(SlabKind.BLOCK)

    def precision_of(self, kind: SlabKind) -> str:
        """The same of any slab."""
        if kind is not SlabKind.BLOCK and self.codec != "raw":
            return "8" if kind is SlabKind.TAIL else "float16"
        name, _, profile = self.codec.partition("-")
        return {"raw": self.dtype, "int8": "8", "int4": "4", "zipcache": "4/2"}.get(name, profile)

    @cached_property
    def zip_format(self) -> ZipFormat | None:
        """Format of a zipped layer; None for other codecs."""
        name, _, profile = self.codec.partition("-")
        if name != "zip":
            return None
        return ZipFormat(self.kv_heads, self.key_dim, self.value_dim, self.block_tokens, profile)

    @property
    def needs_scores(self) -> bool:
        """Whether the codec classes tokens by their saliency."""
        return self.codec == "zipcache" or (self.zip_format is not None and self.zip_format.bits.has_classes)

    @property
    def has_sinks(self) -> bool:
        """Whether a sequence's first tokens have a slab of their own, beside block 0."""
        return self.zip_format is not None

    @property
    def zipcache_salient_tokens(self) -> int:
        """Tokens of a block that `zipcache` codes with 4 bits; the others get 2."""
        return round(ZIPCACHE_SALIENT_SHARE * self.block_tokens)

    @cached_property
    def block_fields(self) -> tuple[Field, ...]:
        """One layer of a sealed block."""
        heads, tokens, dims = self.kv_heads, self.block_tokens, self.key_dim + self.value_dim
        if self.codec == "raw":
            # one head's segment is contiguous, keys before values
            return (Field("heads", self.dtype, (heads, tokens * dims)),)
        if self.codec == "int8":
            return self._int8_fields(tokens)
        if self.codec == "int4":
            return (
                Field("minima", "float16", (heads, tokens, 2)),
                Field("steps", "float16", (heads, tokens, 2)),
                Field("key_codes", "uint8", (heads, tokens, self.key_dim // 2)),
                Field("value_codes", "uint8", (heads, tokens, self.value_dim // 2)),
            )
        if self.codec == "zipcache":
            hi = self.zipcache_salient_tokens
            return (
                # minimum and step: of each key channel for each class, and of all value channels of each token
                Field("key_parameters", "float16", (2, 2, heads, self.key_dim)),
                Field("value_parameters", "float16", (2, tokens)),
                Field("value_channels", "float16", (heads, self.value_dim)),
                Field("classes", "uint8", (tokens // 8,)),
                Field("key_codes_hi", "uint8", (heads, hi, self.key_dim // 2)),
                Field("value_codes_hi", "uint8", (heads, hi, self.value_dim // 2)),
                Field("key_codes_lo", "uint8", (heads, tokens - hi, self.key_dim // 4)),
                Field("value_codes_lo", "uint8", (heads, tokens - hi, self.value_dim // 4)),
            )
        assert self.zip_format is not None
        return (Field("layer", "uint8", (self.zip_format.layer_bytes,)),)

    def tail_fields(self, tokens: int) -> tuple[Field, ...]:
        """One layer of a tail: the codec `raw` keeps the model's dtype, all others code tails in 8 bits."""
        if self.codec == "raw":
            return (Field("heads", self.dtype, (self.kv_heads, tokens * (self.key_dim + self.value_dim))),)
        # what the probe rows so far say of the tokens, so that the reader can seal the block as the writer would
        scores = (Field("scores", "float32", (tokens,)),) if self.needs_scores else ()
        return (*scores, *self._int8_fields(tokens))

    @cached_property
    def sinks_fields(self) -> tuple[Field, ...]:
        """One layer of a sinks slab; empty for codecs without."""
        return (Field("layer", "uint8", (self.zip_format.sinks_layer_bytes,)),) if self.zip_format else ()

    def fields(self, kind: SlabKind, tokens: int) -> tuple[Field, ...]:
        """One layer of a slab that holds `tokens` tokens; blocks and sinks always hold the same number."""
        if kind is SlabKind.TAIL:
            return self.tail_fields(tokens)
        return self.block_fields if kind is SlabKind.BLOCK else self.sinks_fields

    def tokens_of(self, kind: SlabKind) -> int:
        """Most tokens that a slab of a kind holds; blocks and sinks always hold that many."""
        return {
            SlabKind.BLOCK: self.block_tokens,
            SlabKind.TAIL: self.block_tokens - 1,
            SlabKind.SINKS: SINK_TOKENS if self.has_sinks else 0,
        }[kind]

    def payload_bytes(self, kind: SlabKind, tokens: int) -> int:
        """Bytes of the payload of a slab that holds `tokens` tokens."""
        return self.layers * sum(field.size_bytes for field in self.fields(kind, tokens))

    def wire_bytes(self, kind: SlabKind, tokens: int) -> int:
        """Bytes of a slab that travel: header and payload."""
        return HEADER_BYTES + self.payload_bytes(kind, tokens)

    def slab_bytes(self, kind: SlabKind) -> int:
        """Size of a slab of an arena; 0 where the codec has no such kind."""
        if kind is SlabKind.SINKS and not self.has_sinks:
            return 0
        size = self.wire_bytes(kind, self.tokens_of(kind))
        return -(-size // SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES

    def kinds(self) -> tuple[SlabKind, ...]:
        """The kinds of slabs that the codec has, in the order in which a handle lists them."""
        return (*((SlabKind.SINKS,) if self.has_sinks else ()), SlabKind.BLOCK, SlabKind.TAIL)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens when the last one may be partly filled."""
        return -(-tokens // self.block_tokens)

    def slabs_of(self, tokens: int) -> list[tuple[SlabKind, int, int]]:
        """Kind, start position and tokens of each slab of a sequence, in the order in which a handle lists them."""
        blocks, rest = divmod(tokens, self.block_tokens)
        sinks = [(SlabKind.SINKS, 0, SINK_TOKENS)] if blocks and self.has_sinks else []
        full = [(SlabKind.BLOCK, block * self.block_tokens, self.block_tokens) for block in range(blocks)]
        return [*sinks, *full, *([(SlabKind.TAIL, blocks * self.block_tokens, rest)] if rest else [])]

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes that travel for a sequence of `tokens` tokens: blocks, sinks, tail and their headers."""
        return sum(self.wire_bytes(kind, held) for kind, _, held in self.slabs_of(tokens))

    def bits_per_value(self, tokens: int | None = None) -> float:
        """All-in bits per K or V element: codes, parameters, maps, headers, and for a sequence sinks and tail.

        Args:
            tokens: of a whole sequence; None: of a sealed block by itself.
        """
        values = self.layers * self.kv_heads * (self.key_dim + self.value_dim)
        if tokens is None:
            return 8 * self.wire_bytes(SlabKind.BLOCK, self.block_tokens) / (values * self.block_tokens)
        return 8 * self.sequence_bytes(tokens) / (values * tokens)

    def _int8_fields(self, tokens: int) -> tuple[Field, ...]:
        return (
            Field("scales", "float16", (self.kv_heads, tokens, 2)),
            Field("key_codes", "int8", (self.kv_heads, tokens, self.key_dim)),
            Field("value_codes", "int8", (self.kv_heads, tokens, self.value_dim)),
        )
