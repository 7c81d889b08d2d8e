"""The first 128 bytes of a slab: what it is, who sealed it when, and the checksum of all of it.

Little endian: magic, layout version, kind, fingerprint[:16], incarnation, generation, start position, tokens, payload
bytes, prefix hash[:16], zeros, and in the last 8 bytes the checksum over the 120 bytes before it and the payload.
"""

import hashlib
import struct
from dataclasses import dataclass

from zipserve.common.errors import (
    BlockCorruptError,
    BlockStaleError,
    BlockSwappedError,
    IncarnationError,
    LayoutMismatchError,
)
from zipserve.common.kv.layout import HEADER_BYTES, LAYOUT_VERSION, SlabKind
from zipserve.kernels.checksum import Buffer, checksum

MAGIC = b"ZSKV"
SHORT_HASH_BYTES = 16
_FIELDS = struct.Struct("<4sHH16sQQIIQ16s")
_CHECKSUM = struct.Struct("<Q")
_CHECKED_BYTES = HEADER_BYTES - _CHECKSUM.size


@dataclass(frozen=True)
class SlabIdentity:
    """What a slab says of itself, apart from its checksum."""

    kind: SlabKind
    fingerprint: bytes
    """At least the first 16 bytes of the layout's fingerprint; the rest is ignored."""
    incarnation: int
    generation: int
    start_position: int
    tokens: int
    payload_bytes: int
    prefix_hash: bytes
    """At least the first 16 bytes of the chained hash; the rest is ignored."""


def seal(slab: memoryview, identity: SlabIdentity) -> int:
    """Writes the header of a slab whose payload is complete, and returns the checksum.

    Args:
        slab: writable bytes of the slab, at least HEADER_BYTES + payload_bytes long.
    """
    packed = _pack(identity)
    slab[:_CHECKED_BYTES] = packed
    value = _checksum(packed, slab[HEADER_BYTES : HEADER_BYTES + identity.payload_bytes])
    _CHECKSUM.pack_into(slab, _CHECKED_BYTES, value)
    return value


def poison(slab: memoryview) -> None:
    """Marks a slab as free, so that a late read of it is refused even before it is written again."""
    slab[:HEADER_BYTES] = bytes(HEADER_BYTES)


def generation_of(slab: memoryview) -> int:
    """The generation that a slab's header claims; meaningful only if the slab is whole."""
    generation: int = _FIELDS.unpack_from(slab)[5]
    return generation


def verify(slab: memoryview, expected: SlabIdentity, expected_checksum: int) -> None:
    """Checks that a slab that was read is exactly the one that a handle names.

    The order tells the cases apart: a slab that does not match its own checksum is corrupt or torn; a whole one that is
    not the expected one is stale, of another incarnation or layout, or swapped.

    Raises:
        BlockStaleError, BlockCorruptError, LayoutMismatchError, IncarnationError, BlockSwappedError.
    """
    where = f"slab at position {expected.start_position}"
    packed = bytes(slab[:_CHECKED_BYTES])
    if packed == bytes(_CHECKED_BYTES):
        raise BlockStaleError(f"{where} has been freed")
    magic, version, kind, fingerprint, incarnation, generation, start, tokens, size, prefix, *_ = _FIELDS.unpack_from(
        packed
    )
    if magic != MAGIC or size > len(slab) - HEADER_BYTES:
        raise BlockCorruptError(f"{where} has no valid header")
    (stored,) = _CHECKSUM.unpack_from(slab, _CHECKED_BYTES)
    actual = _checksum(packed, slab[HEADER_BYTES : HEADER_BYTES + size])
    if actual != stored:
        raise BlockCorruptError(f"{where} has checksum {actual:016x}, its header says {stored:016x}")
    if version != LAYOUT_VERSION or fingerprint != expected.fingerprint[:SHORT_HASH_BYTES]:
        raise LayoutMismatchError(
            f"{where} has layout v{version} {fingerprint.hex()}, expected v{LAYOUT_VERSION} "
            f"{expected.fingerprint[:SHORT_HASH_BYTES].hex()}"
        )
    if incarnation != expected.incarnation:
        raise IncarnationError(f"{where} was sealed by incarnation {incarnation:016x}, not {expected.incarnation:016x}")
    if generation != expected.generation:
        raise BlockStaleError(f"{where} is of generation {generation}, not {expected.generation}")
    held = (kind, start, tokens, size, prefix)
    wanted = (
        expected.kind,
        expected.start_position,
        expected.tokens,
        expected.payload_bytes,
        expected.prefix_hash[:SHORT_HASH_BYTES],
    )
    if held != wanted or stored != expected_checksum:
        raise BlockSwappedError(f"{where} holds {tokens} tokens from {start} on, not the expected content")


def _pack(identity: SlabIdentity) -> bytes:
    packed = _FIELDS.pack(
        MAGIC,
        LAYOUT_VERSION,
        identity.kind,
        identity.fingerprint[:SHORT_HASH_BYTES],
        identity.incarnation,
        identity.generation,
        identity.start_position,
        identity.tokens,
        identity.payload_bytes,
        identity.prefix_hash[:SHORT_HASH_BYTES],
    )
    return packed.ljust(_CHECKED_BYTES, b"\0")


def _checksum(packed: bytes, payload: Buffer) -> int:
    seed = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
    return checksum(payload, seed)
