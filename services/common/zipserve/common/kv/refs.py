"""Slab identities as the references that handles carry, layouts as workers tell them, and back."""

from dataclasses import asdict, fields

from zipserve.common.kv.header import SHORT_HASH_BYTES, SlabIdentity
from zipserve.common.kv.layout import HEADER_BYTES, Layout, SlabKind
from zipserve.v1 import kv_pb2


def ref_of(identity: SlabIdentity, slab: int, checksum: int) -> kv_pb2.BlockRef:
    """The reference to a slab that was sealed with this checksum."""
    return kv_pb2.BlockRef(
        kind=identity.kind.value,  # type: ignore[arg-type]  # our enum has the numbers of the proto
        slab=slab,
        bytes=HEADER_BYTES + identity.payload_bytes,
        generation=identity.generation,
        start_position=identity.start_position,
        tokens=identity.tokens,
        prefix_hash=identity.prefix_hash[:SHORT_HASH_BYTES],
        checksum=checksum,
    )


def identity_of(ref: kv_pb2.BlockRef, fingerprint: bytes, incarnation: int) -> SlabIdentity:
    """What the slab must say of itself that a reference of this layout and incarnation names."""
    return SlabIdentity(
        kind=SlabKind(ref.kind),
        fingerprint=fingerprint,
        incarnation=incarnation,
        generation=ref.generation,
        start_position=ref.start_position,
        tokens=ref.tokens,
        payload_bytes=ref.bytes - HEADER_BYTES,
        prefix_hash=ref.prefix_hash,
    )


def message_of(layout: Layout) -> kv_pb2.KvLayout:
    """A layout as it travels."""
    return kv_pb2.KvLayout(**asdict(layout))


def layout_of(message: kv_pb2.KvLayout) -> Layout:
    """A layout that has travelled.

    Raises:
        LayoutMismatchError: it is none that we know.
    """
    return Layout(**{field.name: getattr(message, field.name) for field in fields(Layout)})
