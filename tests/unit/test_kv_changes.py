"""Changes that are gathered and told come to what happened; bytes of anybody's making come to nothing."""

from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.kv import changes
from zipserve.common.kv.changes import PendingChanges, outcome, read_blocks, read_event, read_head, told
from zipserve.v1.directory_pb2 import BlockEvent, BlocksAdded, BlocksEvicted, EntryHead, EntryReset

NAMES = [bytes([i]) * 32 for i in range(6)]
CALLS = st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from(NAMES), max_size=4)), max_size=12)


@given(CALLS)
def test_the_outcome_is_what_happened(calls: list[tuple[bool, list[bytes]]]) -> None:
    pending = PendingChanges(1000)
    truth: dict[bytes, bytes | None] = {}
    for is_added, names in calls:
        if is_added:
            pending.added(b"", names)
            truth.update(zip(names, [b"", *names], strict=False))
        else:
            pending.evicted(names)
            truth.update(dict.fromkeys(names))
    told_changes = pending.take()
    assert outcome(told_changes) == truth
    one_by_one: dict[bytes, bytes | None] = {}
    for change in told_changes:
        one_by_one |= outcome([change])
    assert one_by_one == truth
    assert pending.take() == []


def test_neighbours_are_told_as_one() -> None:
    pending = PendingChanges(1000)
    pending.added(b"", NAMES[:2])
    pending.added(NAMES[1], NAMES[2:3])  # stands behind them
    pending.added(b"", NAMES[3:4])
    for name in NAMES[:3]:
        pending.evicted([name])
    assert pending.take() == [
        BlocksAdded(names=NAMES[:3]),
        BlocksAdded(names=NAMES[3:4]),
        BlocksEvicted(names=NAMES[:3]),
    ]


def test_a_change_tells_a_limited_number_of_names() -> None:
    names = [i.to_bytes(32, "big") for i in range(600)]
    pending = PendingChanges(1000)
    pending.added(b"", names)
    pending.evicted(names)
    told_changes = pending.take()
    assert [len(change.names) for change in told_changes] == [256, 256, 88] * 2
    assert changes._CHANGE_NAMES_MAX == 256
    assert outcome(told_changes[:3]) == dict(zip(names, [b"", *names], strict=False))


def test_full() -> None:
    pending = PendingChanges(3)
    pending.added(b"", NAMES[:3])
    assert not pending.is_full
    pending.evicted(NAMES[:1])
    assert pending.is_full
    pending.take()
    assert not pending.is_full


def test_what_is_told_is_read() -> None:
    for change in (BlocksAdded(parent=NAMES[0], names=NAMES[1:]), BlocksEvicted(names=NAMES), EntryReset()):
        event = read_event(told(("p0", 7), 3, change))
        assert event is not None
        assert (event.worker_id, event.incarnation, event.number) == ("p0", 7, 3)
        assert getattr(event, event.WhichOneof("change") or "") == change


@given(st.binary(max_size=80))
def test_anybodys_bytes(value: bytes) -> None:
    event = read_event(value)
    assert event is None or all(len(name) == 32 for name in (*event.added.names, *event.evicted.names))
    assert read_head(value) is None or isinstance(read_head(value), EntryHead)


def test_names_of_a_wrong_size() -> None:
    for event in (
        BlockEvent(added=BlocksAdded(parent=b"x", names=NAMES)),
        BlockEvent(added=BlocksAdded(names=[*NAMES, b"x"])),
        BlockEvent(evicted=BlocksEvicted(names=[b""])),
    ):
        assert read_event(event.SerializeToString()) is None
    assert read_event(None) is None
    assert read_head(None) is None
    row = [(NAMES[0], b""), (NAMES[1], NAMES[0]), (NAMES[2], b"x"), (b"x", b""), (b"", b"")]
    assert read_blocks(row) == row[:2]
