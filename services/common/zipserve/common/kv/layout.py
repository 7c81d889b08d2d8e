"""What fixes a slab's bytes, and where every part of it lies.

A slab is `[header | payload]`. The payload of the `raw` codec is, per layer and per KV head, the keys
`[tokens, key_dim]` and then the values `[tokens, value_dim]` in the model's dtype; so one head's segment of one layer
is contiguous. All offsets are derived here and nowhere else.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from zipserve.common.errors import LayoutMismatchError

LAYOUT_VERSION = 1
HEADER_BYTES = 128
SLAB_ALIGNMENT_BYTES = 4096
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CODECS = ("raw",)


@dataclass(frozen=True)
class Layout:
    """Everything that two workers must agree on before any KV byte moves.

    Raises:
        LayoutMismatchError: for a codec or dtype that this version does not know.
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
    block_tokens: int = 128
    rank: int = 0
    ranks: int = 1
    """Tensor-parallel rank and degree."""
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise LayoutMismatchError(f"codec {self.codec!r} is unknown; known: {', '.join(CODECS)}")
        if self.dtype not in DTYPE_BYTES:
            raise LayoutMismatchError(f"dtype {self.dtype!r} is unknown; known: {', '.join(DTYPE_BYTES)}")

    @cached_property
    def fingerprint(self) -> bytes:
        """sha256 over all fields, 32 bytes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    @property
    def description(self) -> str:
        """Readable form, for logs and errors."""
        return (
            f"{self.model}@{self.revision[:12]} {self.layers} layers x {self.kv_heads} heads x "
            f"{self.key_dim}/{self.value_dim} {self.dtype} {self.codec} block {self.block_tokens} "
            f"rank {self.rank}/{self.ranks} v{self.version}"
        )

    def head_bytes(self, tokens: int) -> int:
        """Bytes of one head's segment of one layer that holds `tokens` tokens."""
        return tokens * (self.key_dim + self.value_dim) * DTYPE_BYTES[self.dtype]

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of a payload that holds `tokens` tokens; a block holds `block_tokens` of them, a tail fewer."""
        return self.layers * self.kv_heads * self.head_bytes(tokens)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a sealed block on the wire: header and payload."""
        return HEADER_BYTES + self.payload_bytes(self.block_tokens)

    def tail_bytes(self, tokens: int) -> int:
        """Bytes of a tail of `tokens` tokens on the wire: header and payload."""
        return HEADER_BYTES + self.payload_bytes(tokens)

    @cached_property
    def block_slab_bytes(self) -> int:
        """Size of a slab of the block arena."""
        return _align(self.block_bytes)

    @cached_property
    def tail_slab_bytes(self) -> int:
        """Size of a slab of the tail arena: room for `block_tokens - 1` tokens."""
        return _align(self.tail_bytes(self.block_tokens - 1))

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens when the last one may be partly filled."""
        return -(-tokens // self.block_tokens)


def _align(size: int) -> int:
    return -(-size // SLAB_ALIGNMENT_BYTES) * SLAB_ALIGNMENT_BYTES
