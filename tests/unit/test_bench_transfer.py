"""`zipserve bench transfer`: how sequences lie in the arenas, shares of raw NIXL, bytes, and the table."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.bench.timing import Timing
from zipserve.bench.transfer import bars
from zipserve.bench.transfer.bars import WAYS, Moved, fp16_bytes
from zipserve.bench.transfer.sequences import Capacity, Memory, slabs_of
from zipserve.common.errors import BlockStaleError, BlockSwappedError
from zipserve.common.kv.layout import Layout, SlabKind


def a_layout(codec: str = "zip-4/32") -> Layout:
    return Layout("m", "0", layers=2, kv_heads=1, key_dim=16, value_dim=16, dtype="float32", codec=codec)


@given(st.sampled_from(["raw", "int8", "zip-4/32"]), st.integers(1, 20), st.integers(1, 2000))
def test_sequences_share_no_slab(codec: str, blocks: int, tokens: int) -> None:
    layout, capacity = a_layout(codec), Capacity(blocks)
    count = capacity.sequences(layout, tokens)
    assert (count == 0) == (tokens // 128 > blocks)
    kinds = [kind for kind, _, _ in layout.slabs_of(tokens)]
    taken = [
        slab
        for sequence in range(count)
        for slab in zip(kinds, slabs_of(layout, tokens, sequence), strict=True)
    ]  # fmt: skip
    assert len(set(taken)) == len(taken)
    assert all(0 <= slab < capacity.slabs(layout, kind) for kind, slab in taken)


def test_what_was_sealed_is_found() -> None:
    memory = Memory(a_layout(), Capacity(4), seed=0)
    first, second = (memory.seal(256, sequence) for sequence in (0, 1))
    assert [(SlabKind(ref.kind), ref.slab) for ref in second] == [
        (SlabKind.SINKS, 1),
        (SlabKind.BLOCK, 2),
        (SlabKind.BLOCK, 3),
    ]
    memory.verify(first)
    memory.verify(second)
    first[1].slab = second[1].slab
    with pytest.raises(BlockSwappedError):
        memory.verify(first)
    memory.clear()
    with pytest.raises(BlockStaleError):
        memory.verify(second)


def moved(tokens: int, size_bytes: int = 1000, codec: str = "zip-4/32", **seconds: float) -> Moved:
    timings = {way: Timing(seconds.get(way, 1.0), 0.5, 2.0) for way in WAYS}
    return Moved("shm", codec, tokens, size_bytes, timings)


def values(some: list[Moved]) -> list[float]:
    layouts = {codec: a_layout(codec) for codec in ("raw", "zip-4/32")}
    return [check.value for check in bars.checks(some, layouts, 4000, decides=True)]


def test_the_worst_length_counts_from_four_blocks_on() -> None:
    some = [moved(256, transfer=9.0), moved(512, transfer=2.0, pull=8.0), moved(1024, transfer=1.25, pull=4.0)]
    assert values(some) == [0.5, 0.125]
    assert all(map(math.isnan, values(some[:1])))


def test_a_slow_transfer_decides_and_a_slow_pull_does_not() -> None:
    transfer, pull = bars.checks([moved(512, transfer=2.0)], {"zip-4/32": a_layout()}, 4000, decides=True)
    assert (transfer.met, transfer.decides, pull.decides) == (False, True, False)


def test_bytes_against_fp16() -> None:
    layout = a_layout()
    size = fp16_bytes(layout, 4000)
    assert size == 4000 * 2 * (16 + 16) * 2
    assert values([moved(4000, size // 4)])[2] == 4.0
    assert len(values([moved(4000, size, codec="raw")])) == 2


def test_table() -> None:
    text = bars.table([moved(512, 2_000_000_000, transfer=1.25), moved(4000)], {"zip-4/32": a_layout()})
    _, first, second = text.splitlines()
    assert first.split()[:8] == ["zip-4/32", "shm", "4", "blocks", "2000.00", "2.00", "1.00", "4.00"]
    assert first.split()[-2:] == ["80%", "100%"]
    assert "4000 tokens" in second
