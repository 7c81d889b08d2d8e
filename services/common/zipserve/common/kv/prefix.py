"""Chained hashes of token ids: the name of a block is the hash of everything up to its end."""

import hashlib
import struct
from collections.abc import Sequence

HASH_BYTES = 32


def chain_salt(fingerprint: bytes, cache_salt: str) -> bytes:
    """What starts the chain of a tenant's sequences in one layout, whose fingerprint is always equally long."""
    return fingerprint + cache_salt.encode()


def prefix_hashes(token_ids: Sequence[int], block_tokens: int, salt: bytes) -> list[bytes]:
    """sha256 chain over the slabs of a sequence, 32 bytes each.

    Entry i covers tokens 0 .. (i + 1) * block_tokens; the last entry covers a shorter rest, if there is one. `salt`
    (see `chain_salt`) starts the chain, so that other layouts and tenants never share a name.
    """
    parent = hashlib.sha256(salt).digest()
    hashes = []
    for start in range(0, len(token_ids), block_tokens):
        ids = token_ids[start : start + block_tokens]
        parent = hashlib.sha256(parent + struct.pack(f"<{len(ids)}I", *ids)).digest()
        hashes.append(parent)
    return hashes
