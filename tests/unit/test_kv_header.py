"""Slab headers: whatever happened to a slab, a reader notices, and says what it was."""

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import (
    BlockCorruptError,
    BlockStaleError,
    BlockSwappedError,
    HandoffError,
    IncarnationError,
    LayoutMismatchError,
)
from zipserve.common.kv import header
from zipserve.common.kv.header import SlabIdentity, poison, seal, verify
from zipserve.common.kv.layout import HEADER_BYTES, LAYOUT_VERSION, SlabKind
from zipserve.v1 import kv_pb2

PAYLOAD_BYTES = 96
IDENTITY = SlabIdentity(
    kind=SlabKind.BLOCK,
    fingerprint=bytes(range(32)),
    incarnation=0xFEDC_BA98_7654_3210,
    generation=17,
    start_position=32,
    tokens=16,
    payload_bytes=PAYLOAD_BYTES,
    prefix_hash=bytes(range(100, 132)),
)
OTHERS: list[tuple[str, Any, type[HandoffError]]] = [
    ("fingerprint", b"another layout: " * 2, LayoutMismatchError),
    ("incarnation", 0xFEDC_BA98_7654_3211, IncarnationError),
    ("generation", 16, BlockStaleError),
    ("generation", 18, BlockStaleError),
    ("kind", SlabKind.TAIL, BlockSwappedError),
    ("start_position", 48, BlockSwappedError),
    ("tokens", 15, BlockSwappedError),
    ("payload_bytes", PAYLOAD_BYTES - 4, BlockSwappedError),
    ("prefix_hash", b"another sequence" * 2, BlockSwappedError),
]


def sealed(identity: SlabIdentity = IDENTITY, fill: int = 1, spare_bytes: int = 0) -> tuple[memoryview, int]:
    """A slab with a payload that depends on `fill`, and its checksum."""
    payload = bytes((i * 31 * fill + fill) % 256 for i in range(identity.payload_bytes))
    slab = memoryview(bytearray(HEADER_BYTES + len(payload) + spare_bytes))
    slab[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return slab, seal(slab, identity)


def test_a_good_slab() -> None:
    slab, checksum = sealed(spare_bytes=64)
    before = bytes(slab)
    verify(slab, IDENTITY, checksum)
    verify(slab[: HEADER_BYTES + PAYLOAD_BYTES], IDENTITY, checksum)
    assert bytes(slab) == before


def test_only_sixteen_bytes_of_hashes_count() -> None:
    slab, checksum = sealed()
    short = dataclasses.replace(IDENTITY, fingerprint=IDENTITY.fingerprint[:16], prefix_hash=IDENTITY.prefix_hash[:16])
    verify(slab, short, checksum)
    assert sealed(short)[1] == checksum


def test_every_flipped_bit_is_refused() -> None:
    slab, checksum = sealed()
    for bit in range(8 * len(slab)):
        slab[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(BlockCorruptError):
            verify(slab, IDENTITY, checksum)
        slab[bit // 8] ^= 1 << (bit % 8)
    verify(slab, IDENTITY, checksum)


@pytest.mark.parametrize(("field", "value", "error"), OTHERS, ids=lambda value: getattr(value, "__name__", None))
def test_a_whole_slab_that_is_not_the_expected_one(field: str, value: Any, error: type[HandoffError]) -> None:
    slab, checksum = sealed(spare_bytes=16)
    expected = dataclasses.replace(IDENTITY, **{field: value})
    with pytest.raises(error) as raised:
        verify(slab, expected, checksum)
    assert type(raised.value) is error
    other, _ = sealed(expected, spare_bytes=16)
    with pytest.raises(error):  # the other way round: the slab differs from the handle
        verify(other, IDENTITY, checksum)


def test_there_is_another_value_for_every_field() -> None:
    assert {field for field, _, _ in OTHERS} == {field.name for field in dataclasses.fields(SlabIdentity)}


def test_another_payload_under_the_same_identity() -> None:
    """The checksum in the signed handle decides, not the one that the slab brings."""
    _, checksum = sealed(fill=1)
    other, _ = sealed(fill=2)
    with pytest.raises(BlockSwappedError):
        verify(other, IDENTITY, checksum)


def test_another_layout_version(monkeypatch: pytest.MonkeyPatch) -> None:
    slab, checksum = sealed()
    monkeypatch.setattr(header, "LAYOUT_VERSION", LAYOUT_VERSION + 1)
    with pytest.raises(LayoutMismatchError, match=rf"layout v{LAYOUT_VERSION} .* expected v{LAYOUT_VERSION + 1}"):
        verify(slab, IDENTITY, checksum)


def test_a_freed_slab() -> None:
    slab, checksum = sealed()
    payload = bytes(slab[HEADER_BYTES:])
    poison(slab)
    assert bytes(slab[HEADER_BYTES:]) == payload, "poisoning is cheap: the header only"
    with pytest.raises(BlockStaleError, match="freed"):
        verify(slab, IDENTITY, checksum)


def test_a_slab_that_was_never_written() -> None:
    with pytest.raises(BlockStaleError):
        verify(memoryview(bytearray(HEADER_BYTES + PAYLOAD_BYTES)), IDENTITY, 0)


def test_a_size_beyond_the_slab_is_not_followed() -> None:
    """The size stands in the bytes that are to be checked: it may be anything."""
    slab, checksum = sealed()
    for size in (PAYLOAD_BYTES + 1, 1 << 40, (1 << 64) - 1):
        struct.pack_into("<Q", slab, 4 + 2 + 2 + 16 + 8 + 8 + 4 + 4, size)
        with pytest.raises(BlockCorruptError, match="no valid header"):
            verify(slab, IDENTITY, checksum)


@pytest.mark.parametrize("word", range(0, HEADER_BYTES + PAYLOAD_BYTES, 8))
def test_torn_between_two_generations(word: int) -> None:
    """The front is of one life of the slab, the rest of another, torn at any word: never taken for either."""
    old, old_checksum = sealed(fill=1)
    newer = dataclasses.replace(IDENTITY, generation=IDENTITY.generation + 1)
    new, new_checksum = sealed(newer, fill=2)
    torn = memoryview(bytearray(bytes(old[:word]) + bytes(new[word:])))
    with pytest.raises((BlockCorruptError, BlockStaleError)):
        verify(torn, IDENTITY, old_checksum)
    if bytes(torn) == bytes(new):  # the front is the same in both
        verify(torn, newer, new_checksum)
    else:
        with pytest.raises(BlockCorruptError):
            verify(torn, newer, new_checksum)


@given(st.data())
def test_torn_anyhow(data: st.DataObject) -> None:
    """Any mixture of the words of two slabs, the two themselves excepted, is corrupt or not the expected one."""
    one, checksum = sealed(fill=data.draw(st.integers(1, 100)))
    newer = dataclasses.replace(IDENTITY, generation=IDENTITY.generation + 1, start_position=0)
    other, _ = sealed(newer, fill=data.draw(st.integers(101, 200)))
    words = len(one) // 4
    mask = data.draw(st.lists(st.booleans(), min_size=words, max_size=words))
    parts = [bytes((other if take else one)[4 * i : 4 * i + 4]) for i, take in enumerate(mask)]
    torn = memoryview(bytearray(b"".join(parts)))
    if bytes(torn) == bytes(one):
        verify(torn, IDENTITY, checksum)
    else:
        with pytest.raises(HandoffError):
            verify(torn, IDENTITY, checksum)


def test_half_freed() -> None:
    """The zeros of `poison` have arrived in part."""
    for zeros in range(1, HEADER_BYTES):
        slab, checksum = sealed()
        slab[:zeros] = bytes(zeros)
        with pytest.raises((BlockCorruptError, BlockStaleError)):
            verify(slab, IDENTITY, checksum)


def test_kinds_have_the_numbers_of_the_proto() -> None:
    assert {kind.name: kind.value for kind in SlabKind} == {
        name.removeprefix("SLAB_KIND_"): number
        for name, number in kv_pb2.SlabKind.items()
        if number != kv_pb2.SLAB_KIND_UNSPECIFIED
    }
