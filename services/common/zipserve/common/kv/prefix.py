"""Chained hashes of token ids: the name of a block is the hash of everything up to its end."""

import hashlib
import struct
from collections.abc import Sequence

HASH_BYTES = 32


def chain_salt(fingerprint: bytes, cache_salt: str) -> bytes:
    """What starts the chain of a tenant's sequences in one layout, whose fingerprint is always equally long."""
    return fingerprint + cache_salt.encode()


class PrefixChain:
    """Names of the full blocks of a sequence that grows.

    Args:
        salt: starts the chain (see `chain_salt`), so that other layouts and tenants never share a name.
    """

    def __init__(self, block_tokens: int, salt: bytes) -> None:
        self._block_tokens = block_tokens
        self._parent = hashlib.sha256(salt).digest()
        self._open: list[int] = []
        """Token ids behind the last full block."""
        self.names: list[bytes] = []
        """32 bytes each; that of block i covers tokens 0 .. (i + 1) * block_tokens."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds tokens to the sequence."""
        self._open.extend(token_ids)
        full = len(self._open) // self._block_tokens * self._block_tokens
        for start in range(0, full, self._block_tokens):
            self._parent = _name(self._parent, self._open[start : start + self._block_tokens])
            self.names.append(self._parent)
        del self._open[:full]

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return len(self.names) * self._block_tokens + len(self._open)

    def copy(self) -> "PrefixChain":
        """Another chain of the same tokens, which grows by itself."""
        other = PrefixChain(self._block_tokens, b"")
        other._parent, other._open, other.names = self._parent, list(self._open), list(self.names)
        return other

    def slab_names(self) -> list[bytes]:
        """Names of all slabs: of the full blocks, and of what follows them if anything does."""
        return [*self.names, _name(self._parent, self._open)] if self._open else list(self.names)


def prefix_hashes(token_ids: Sequence[int], block_tokens: int, salt: bytes) -> list[bytes]:
    """Names of the slabs of a whole sequence, as `PrefixChain.slab_names` gives them."""
    chain = PrefixChain(block_tokens, salt)
    chain.extend(token_ids)
    return chain.slab_names()


def _name(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()
