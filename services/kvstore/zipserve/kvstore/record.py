"""What stands before every slab on disk, and how blocks are found again from it. Pure.

A record is a page of zeros with these fields at its start, little endian: magic, version, kind, the layout's
fingerprint, the block's name and its parent's, incarnation, generation, start position, tokens and payload bytes of the
slab, its checksum and that of the sinks beside it, and a digest over all of them.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from zipserve.common.errors import BlockCorruptError, LayoutMismatchError
from zipserve.common.kv.header import SlabIdentity
from zipserve.common.kv.layout import HEADER_BYTES, Layout, SlabKind
from zipserve.common.kv.refs import ref_of
from zipserve.v1.kv_pb2 import BlockRef

RECORD_BYTES = 4096
"""A page, so that slabs begin at one too, and that no page is read only to write a part of it."""
NO_RECORD = bytes(RECORD_BYTES)
_MAGIC = b"ZSDK"
_VERSION = 1
_FIELDS = struct.Struct("<4sHH32s32s32sQQIIQQQ")
_DIGEST_BYTES = 16
FIELDS_BYTES = _FIELDS.size + _DIGEST_BYTES
"""Of a record, before its zeros."""


@dataclass(frozen=True)
class Record:
    """Of one slab on disk."""

    identity: SlabIdentity
    """What the slab says of itself, with the whole fingerprint and the block's whole name."""
    parent: bytes
    """Name of the block before it; empty for block 0."""
    checksum: int
    sinks_checksum: int = 0
    """Of the slab of the sinks that belong to this very block, if it has any."""

    @property
    def name(self) -> bytes:
        """Of the block."""
        return self.identity.prefix_hash

    @property
    def slab_bytes(self) -> int:
        """Bytes of the slab, header included."""
        return HEADER_BYTES + self.identity.payload_bytes

    def ref(self, slot: int) -> BlockRef:
        """The reference to the slab in a slot."""
        return ref_of(self.identity, slot, self.checksum)

    def fits(self, layout: Layout, kind: SlabKind) -> bool:
        """Whether it is of a slab of a kind, as the layout has them."""
        slab = self.identity
        wanted = (kind, layout.fingerprint, layout.tokens_of(kind), layout.payload_bytes(kind, layout.tokens_of(kind)))
        return (slab.kind, slab.fingerprint, slab.tokens, slab.payload_bytes) == wanted

    def pack(self) -> bytes:
        """RECORD_BYTES bytes."""
        slab = self.identity
        fields = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            slab.kind,
            slab.fingerprint,
            slab.prefix_hash,
            self.parent,
            slab.incarnation,
            slab.generation,
            slab.start_position,
            slab.tokens,
            slab.payload_bytes,
            self.checksum,
            self.sinks_checksum,
        )
        return (fields + _digest(fields)).ljust(RECORD_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Self | None:
        """The record that begins a slot; None where there is none.

        Raises:
            BlockCorruptError: it is torn or damaged.
            LayoutMismatchError: it is of another version.
        """
        fields, digest = bytes(data[: _FIELDS.size]), bytes(data[_FIELDS.size : FIELDS_BYTES])
        if not any(fields) and not any(digest):
            return None
        if len(digest) < _DIGEST_BYTES or digest != _digest(fields):
            raise BlockCorruptError("a record on disk does not match its digest")
        magic, version, kind, fingerprint, name, parent, *numbers = _FIELDS.unpack(fields)
        incarnation, generation, start, tokens, payload_bytes, checksum, sinks_checksum = numbers
        if (magic, version) != (_MAGIC, _VERSION):
            raise LayoutMismatchError(f"a record on disk is of version {version}, expected {_VERSION}")
        identity = SlabIdentity(
            SlabKind(kind), fingerprint, incarnation, generation, start, tokens, payload_bytes, prefix_hash=name
        )
        return cls(identity, parent if start else b"", checksum, sinks_checksum)


class Stored(NamedTuple):
    """A block on disk."""

    name: bytes
    parent: bytes
    refs: tuple[BlockRef, ...]
    """Of the sinks, if it is block 0 of a codec with sinks, and of the block; `slab` is the slot."""


def chains(records: Mapping[SlabKind, Mapping[int, Record]], layout: Layout) -> Iterator[Stored]:
    """The blocks that stand behind each other from block 0 on, each once, and after the one before it.

    Args:
        records: by kind and slot; all fit the layout.
    """
    sinks = {(r.name, r.checksum): r.ref(slot) for slot, r in records.get(SlabKind.SINKS, {}).items()}
    behind: dict[bytes, dict[bytes, Stored]] = {}
    """By the parent's name and by their own."""
    for slot, record in records[SlabKind.BLOCK].items():
        refs = [record.ref(slot)]
        if layout.has_sinks and not record.parent:
            beside = sinks.get((record.name, record.sinks_checksum))
            if beside is None:
                continue
            refs.insert(0, beside)
        block = Stored(record.name, record.parent, tuple(refs))
        behind.setdefault(block.parent, {})[block.name] = block
    found = list(behind.pop(b"", {}).values())
    for block in found:
        yield block
        found.extend(behind.pop(block.name, {}).values())


def _digest(fields: bytes) -> bytes:
    return hashlib.blake2b(fields, digest_size=_DIGEST_BYTES).digest()
