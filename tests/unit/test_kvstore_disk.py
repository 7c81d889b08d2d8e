"""Blocks on disk: whatever is read is what was written, whatever happened to the files in between."""

import errno
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from structlog.testing import capture_logs

from zipserve.common.errors import BlockCorruptError, HandoffError, InternalError, TransferError, UnavailableError
from zipserve.common.kv import header
from zipserve.common.kv.header import SlabIdentity
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import Slabs
from zipserve.common.kv.prefix import prefix_hashes
from zipserve.common.kv.prefix_index import CachedBlock
from zipserve.common.kv.refs import ref_of
from zipserve.kvstore.disk import DiskTier
from zipserve.kvstore.record import FIELDS_BYTES, NO_RECORD, RECORD_BYTES, Record
from zipserve.v1.kv_pb2 import BlockRef

BLOCK = 64
INCARNATION = 0xFEDC_BA98_7654_3210
CODECS = ("raw", "zip-4/32")


def a_layout(codec: str = "zip-4/32", model: str = "m") -> Layout:
    return Layout(model, "0", 1, 1, 16, 16, "float32", codec, BLOCK)


def names_of(path: tuple[int, ...]) -> list[bytes]:
    """Names of the blocks of a sequence whose blocks have these contents."""
    return prefix_hashes([token for token in path for _ in range(BLOCK)], BLOCK, b"")


def sealed(layout: Layout, name: bytes, block: int, generation: int = 7) -> tuple[list[BlockRef], list[memoryview]]:
    """A block of random bytes, which depend on its name and generation: references to its slabs, and those."""
    kinds = [SlabKind.BLOCK] if block or not layout.has_sinks else [SlabKind.SINKS, SlabKind.BLOCK]
    refs, slabs = [], []
    for kind in kinds:
        tokens = layout.tokens_of(kind)
        identity = SlabIdentity(
            kind,
            layout.fingerprint,
            INCARNATION,
            generation,
            block * BLOCK,
            tokens,
            layout.payload_bytes(kind, tokens),
            name,
        )
        filling = Random(name + bytes([kind, generation])).randbytes(layout.slab_bytes(kind))
        slab = memoryview(bytearray(filling))
        refs.append(ref_of(identity, 3, header.seal(slab, identity)))
        slabs.append(slab)
    return refs, slabs


def write(tier: DiskTier, layout: Layout, path: tuple[int, ...], generation: int = 7) -> int:
    """Writes the blocks of a sequence that are not there; returns how many are then."""
    names = names_of(path)
    tier.note_request(names)
    run = tier.find(names)
    for block in range(len(run), len(path)):
        refs, slabs = sealed(layout, names[block], block, generation)
        reservation = tier.reserve(run, names[block], refs, INCARNATION)
        if reservation is None:
            break
        tier.store(reservation, slabs)
        if not tier.commit(reservation):
            break
    return len(run)


def read(tier: DiskTier, layout: Layout, block: CachedBlock) -> list[memoryview]:
    """The slabs of a block, checked by the tier."""
    slabs = [memoryview(bytearray(layout.slab_bytes(SlabKind(ref.kind)))) for ref in block.refs]
    held = tier.hold([*_before(block), block])
    try:
        tier.load(block, slabs)
    finally:
        tier.release(held)
    return slabs


def _before(block: CachedBlock) -> list[CachedBlock]:
    return [] if block.parent is None else [*_before(block.parent), block.parent]


def expect_content(tier: DiskTier, layout: Layout, path: tuple[int, ...], blocks: int, generation: int = 7) -> None:
    """Exactly `blocks` blocks of a sequence are there, as they were written."""
    names = names_of(path)
    run = tier.find(names)
    assert len(run) == blocks
    for number, block in enumerate(run):
        _, written = sealed(layout, names[number], number, generation)
        for ref, was, is_ in zip(block.refs, written, read(tier, layout, block), strict=True):
            assert is_[: ref.bytes] == was[: ref.bytes]


def kill(tier: DiskTier) -> None:
    """What is left of a tier whose process is killed: the kernel closes its files."""
    tier._resources.close()


def file_of(folder: Path, kind: SlabKind = SlabKind.BLOCK) -> Path:
    return next(folder.glob("*")) / ("blocks" if kind is SlabKind.BLOCK else "sinks")


def slot_bytes(layout: Layout, kind: SlabKind = SlabKind.BLOCK) -> int:
    return RECORD_BYTES + layout.slab_bytes(kind)


def change(path: Path, offset: int, data: bytes | Callable[[bytes], bytes], size: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        new = data if isinstance(data, bytes) else data(file.read(size))
        file.seek(offset)
        file.write(new)


PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)


class DiskMachine(RuleBasedStateMachine):
    """Sequences are written and read, the tier is closed, killed and opened, records and slabs are damaged."""

    @initialize(codec=st.sampled_from(CODECS), slots=st.integers(1, 7))
    def start(self, codec: str, slots: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.layout, self.slots = a_layout(codec), slots
        self.generation = 1
        self.written: dict[bytes, set[bytes]] = {}
        """What the slabs of a block may be, as one string: what has ever been written for it."""
        self.held: list[tuple[list[CachedBlock], Slabs]] = []
        self.damaged: set[bytes] = set()
        self.ever_damaged: set[bytes] = set()
        """Where a process is killed before the record is blanked, they come back."""
        self.open()

    def open(self) -> None:
        self.tier = DiskTier.open(self.folder, self.layout, self.slots)
        self.evicted: set[bytes] = set()
        self.tier.index.on_removed = lambda block: self.evicted.add(block.name)

    @rule(path=PATHS)
    def write(self, path: tuple[int, ...]) -> None:
        self.generation += 1
        names = names_of(path)
        for block, name in enumerate(names):
            refs, slabs = sealed(self.layout, name, block, self.generation)
            content = b"".join(bytes(slab[: ref.bytes]) for ref, slab in zip(refs, slabs, strict=True))
            self.written.setdefault(name, set()).add(content)
        held = {block for run, _ in self.held for block in run}
        in_use = held & set(self.tier.index)  # others were discarded, and have their slots until they are released
        there = write(self.tier, self.layout, path, self.generation)
        assert there == min(len(path), self.slots) or len(held) + there >= self.slots
        assert in_use <= set(self.tier.index)

    @rule(path=PATHS)
    def read(self, path: tuple[int, ...]) -> None:
        for block in self.tier.find(names_of(path)):
            try:
                slabs = read(self.tier, self.layout, block)
            except HandoffError as error:
                gone = self.tier.discard(block, error)
                assert gone[0] == block.name
                assert block.name in self.ever_damaged
                assert block.name not in self.tier.index
                self.damaged -= set(gone)
                break
            content = b"".join(bytes(slab[: ref.bytes]) for ref, slab in zip(block.refs, slabs, strict=True))
            assert content in self.written[block.name]

    @rule(path=PATHS)
    def hold(self, path: tuple[int, ...]) -> None:
        if run := self.tier.find(names_of(path)):
            self.held.append((run, self.tier.hold(run)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, slabs = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.tier.release(slabs)

    @rule(is_killed=st.booleans(), slots=st.integers(1, 7))
    def reopen(self, is_killed: bool, slots: int) -> None:
        before = set(self.tier.index.entries())
        if is_killed:
            kill(self.tier)
        else:
            for _, slabs in self.held:
                self.tier.release(slabs)
            self.tier.close()
        self.held.clear()
        has_all, self.slots = slots >= self.slots, slots
        self.open()
        after = set(self.tier.index.entries())
        undamaged = {entry for entry in before if not self._is_behind_damage(dict(before), entry[0])}
        if has_all:
            assert undamaged <= after
        if has_all and not is_killed:  # a kill may leave records of blocks that were evicted or discarded
            assert after <= before
        assert all(not parent or parent in self.tier.index for _, parent in after)

    @precondition(lambda self: len(self.tier) > 0)
    @rule(data=st.data(), at=st.integers(0, 2**20), bit=st.integers(0, 7))
    def flip(self, data: st.DataObject, at: int, bit: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.tier.index, key=lambda block: block.name)))
        ref = data.draw(st.sampled_from(block.refs))
        kind = SlabKind(ref.kind)
        parts = (range(FIELDS_BYTES), range(RECORD_BYTES, RECORD_BYTES + ref.bytes))
        offset = [*parts[0], *parts[1]][at % (FIELDS_BYTES + ref.bytes)]
        if block.name not in self.ever_damaged:
            place = ref.slab * slot_bytes(self.layout, kind) + offset
            change(file_of(self.folder, kind), place, lambda old: bytes([old[0] ^ 1 << bit]))
            self.damaged.add(block.name)
            self.ever_damaged.add(block.name)

    def _is_behind_damage(self, parents: dict[bytes, bytes], name: bytes) -> bool:
        return bool(name) and (name in self.damaged or self._is_behind_damage(parents, parents[name]))

    @invariant()
    def books_balance(self) -> None:
        self.tier.index.check_integrity()
        self.tier._pools.check_integrity()
        self.damaged &= {block.name for block in self.tier.index}

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
            shutil.rmtree(self.folder)


DiskMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=25)
TestDiskTier = DiskMachine.TestCase


@pytest.fixture(params=CODECS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return a_layout(request.param)


@pytest.fixture
def tier(tmp_path: Path, layout: Layout) -> Iterator[DiskTier]:
    """Of 8 slots, in which the sequences 1 2 3 and 4 are."""
    tier = DiskTier.open(tmp_path, layout, 8)
    assert (write(tier, layout, (1, 2, 3)), write(tier, layout, (4,))) == (3, 1)
    yield tier
    kill(tier)


def test_entries_name_the_block_before(tier: DiskTier) -> None:
    names = names_of((1, 2, 3))
    assert dict(tier.index.entries()) == {names[0]: b"", names[1]: names[0], names[2]: names[1], names_of((4,))[0]: b""}
    listed = [name for name, _ in tier.index.entries()]
    assert listed.index(names[0]) < listed.index(names[1]) < listed.index(names[2])


def test_what_no_memory_knows_any_more_is_found_again(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    kill(tier)
    again = DiskTier.open(tmp_path, layout, 8)
    expect_content(again, layout, (1, 2, 3), 3)
    expect_content(again, layout, (4,), 1)
    assert write(again, layout, (4, 5)) == 2
    again.close()


def test_what_was_evicted_or_discarded_does_not_come_back(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    evicted: list[bytes] = []
    tier.index.on_removed = lambda block: evicted.append(block.name)
    assert write(tier, layout, (5, 6, 7, 8, 9)) == 5
    assert evicted == [names_of((1, 2, 3))[-1]]
    names = names_of((5, 6, 7))
    assert tier.discard(tier.find(names)[-1], BlockCorruptError("as a test says"))[0] == names[-1]
    entries = set(tier.index.entries())
    assert len(entries) == 5
    tier.close()
    again = DiskTier.open(tmp_path, layout, 8)
    assert set(again.index.entries()) == entries
    again.close()


def test_a_record_is_blank_once_another_block_was_written(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    (block,) = tier.find(names_of((4,)))
    tier.discard(block, BlockCorruptError("as a test says"))
    assert write(tier, layout, (5,)) == 1
    with file_of(tmp_path).open("rb") as file:
        file.seek(block.refs[-1].slab * slot_bytes(layout))
        assert file.read(RECORD_BYTES) == NO_RECORD


def test_a_record_is_blank_also_when_the_next_block_could_not_be_written(
    tmp_path: Path, layout: Layout, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tier.discard(tier.find(names_of((4,)))[0], BlockCorruptError("as a test says"))
    with monkeypatch.context() as patch:
        patch.setattr("zipserve.kvstore.slots.os", SimpleNamespace(**{**vars(os), "pwrite": pwrite}))
        assert write(tier, layout, (5,)) == 0
    assert write(tier, layout, (6,)) == 1
    kill(tier)
    again = DiskTier.open(tmp_path, layout, 8)
    assert {name for name, _ in again.index.entries()} == {*names_of((1, 2, 3)), *names_of((6,))}
    kill(again)


class Interrupted(BaseException):
    """The process ends here."""


def interrupt(monkeypatch: pytest.MonkeyPatch, calls: int, share: float) -> None:
    """Ends the process in a write, before which `calls` have succeeded; of that one, a part gets to the file."""
    left = [calls]
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if not left[0]:
            real(descriptor, data[: int(len(data) * share)], offset)
            raise Interrupted
        left[0] -= 1
        return real(descriptor, data, offset)

    monkeypatch.setattr("zipserve.kvstore.slots.os", SimpleNamespace(**{**vars(os), "pwrite": pwrite}))


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("is_full", [False, True])
def test_a_write_that_is_cut_off_anywhere_leaves_nothing_or_all(
    tmp_path: Path, layout: Layout, share: float, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for calls in range(20):
        folder = tmp_path / str(calls)
        tier = DiskTier.open(folder, layout, 4 if is_full else 8)
        assert (write(tier, layout, (1, 2, 3)), write(tier, layout, (4,))) == (3, 1)
        with monkeypatch.context() as patch:
            interrupt(patch, calls, share)
            try:
                write(tier, layout, (5,))
            except Interrupted:
                is_cut = True
            else:
                is_cut = False
        kill(tier)
        again = DiskTier.open(folder, layout, 8)
        left = len(again.find(names_of((1, 2, 3))))
        assert left in ((2, 3) if is_full else (3,))
        expect_content(again, layout, (1, 2, 3), left)
        expect_content(again, layout, (4,), 1)
        there = len(again.find(names_of((5,))))
        expect_content(again, layout, (5,), there)
        ends.append(there)
        kill(again)
        if not is_cut:
            break
    assert ends[-1] == 1
    assert ends == sorted(ends), "there from some step on"
    assert sum(ends) == (2 if share >= 0.5 else 1), "but not before the last one"


@pytest.mark.parametrize("kind", [SlabKind.BLOCK, SlabKind.SINKS])
@pytest.mark.parametrize("part", ["record", "digest", "name", "header", "payload", "last byte"])
@pytest.mark.parametrize("damage", ["bit", "zeros", "cut"])
@pytest.mark.parametrize("is_open", [False, True])
def test_damage_is_noticed(tmp_path: Path, kind: SlabKind, part: str, damage: str, is_open: bool) -> None:
    layout = a_layout()
    tier = DiskTier.open(tmp_path, layout, 8)
    assert (write(tier, layout, (4,)), write(tier, layout, (1, 2))) == (1, 2)
    victim = tier.find(names_of((1,)))[0]
    ref = victim.refs[0 if kind is SlabKind.SINKS else -1]
    inside = {
        "record": 0,
        "digest": FIELDS_BYTES - 16,
        "name": 40,
        "header": RECORD_BYTES,
        "payload": RECORD_BYTES + 150,
        "last byte": RECORD_BYTES + ref.bytes - 1,
    }[part]
    offset, file = ref.slab * slot_bytes(layout, kind) + inside, file_of(tmp_path, kind)
    if not is_open:
        kill(tier)
    if damage == "bit":
        change(file, offset, lambda old: bytes([old[0] ^ 4]))
    elif damage == "zeros":
        size = 128 if part == "header" else 16 if part in ("digest", "name") else 1 if part == "last byte" else 4
        change(file, offset, lambda old: bytes(len(old)), size)
    else:
        os.truncate(file, offset)
    again = tier if is_open else DiskTier.open(tmp_path, layout, 8)
    run = again.find(names_of((1, 2)))
    if not is_open and inside < RECORD_BYTES:
        assert run == []
    else:
        with pytest.raises(HandoffError) as error:
            read(again, layout, run[0])
        assert again.discard(run[0], error.value) == names_of((1, 2))[: len(run)]
        assert (
            again.counts.discarded
            == len(run)
            == (1 if damage == "cut" and kind is SlabKind.BLOCK and not is_open else 2)
        )
    expect_content(again, layout, (4,), 1)
    expect_content(again, layout, (1, 2), 0)
    assert write(again, layout, (1, 2)) == 2
    expect_content(again, layout, (1, 2), 2)
    again.close()


def test_blocks_without_the_one_before_them_are_dropped_and_said_so_once(
    tmp_path: Path, layout: Layout, tier: DiskTier
) -> None:
    block = tier.find(names_of((1, 2)))[1]
    kill(tier)
    change(file_of(tmp_path), block.refs[-1].slab * slot_bytes(layout), NO_RECORD)
    with capture_logs() as logs:
        again = DiskTier.open(tmp_path, layout, 8)
    assert [(log["event"], log["log_level"], log["dropped"]) for log in logs] == [
        ("disk.opened", "warning", {"loose": 1})
    ]
    expect_content(again, layout, (1, 2, 3), 1)
    kill(again)
    with capture_logs() as logs:
        again = DiskTier.open(tmp_path, layout, 8)
    assert [(log["log_level"], log["dropped"]) for log in logs] == [("info", {})]
    assert write(again, layout, (5, 6, 7, 8, 9, 10)) == 6
    assert len(again) == 8
    kill(again)


def test_a_block_that_is_there_twice_is_found_once(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    kill(tier)
    for kind in layout.kinds()[:-1]:
        content = file_of(tmp_path, kind).read_bytes()
        with file_of(tmp_path, kind).open("r+b") as file:
            file.seek(4 * slot_bytes(layout, kind))  # before which all slots are that are used
            file.write(content[: slot_bytes(layout, kind)])
    again = DiskTier.open(tmp_path, layout, 8)
    expect_content(again, layout, (1, 2, 3), 3)
    assert len(again) == 4
    assert write(again, layout, (5, 6, 7, 8)) == 4
    assert len(again) == 8
    kill(again)


def test_sinks_of_another_life_of_the_block_are_not_taken_for_its_own(tmp_path: Path) -> None:
    layout = a_layout()
    tier = DiskTier.open(tmp_path / "one", layout, 2)
    assert write(tier, layout, (1,)) == 1
    tier.close()
    tier = DiskTier.open(tmp_path / "two", layout, 2)
    assert write(tier, layout, (1,), generation=8) == 1
    tier.close()
    shutil.copy(file_of(tmp_path / "two", SlabKind.SINKS), file_of(tmp_path / "one", SlabKind.SINKS))
    tier = DiskTier.open(tmp_path / "one", layout, 2)
    assert len(tier) == 0
    tier.close()


def test_records_of_another_layout_or_version_are_dropped(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    kill(tier)
    other = a_layout(layout.codec, model="another")
    DiskTier.open(tmp_path / "other", other, 8).close()
    for kind in layout.kinds()[:-1]:
        shutil.copy(file_of(tmp_path, kind), file_of(tmp_path / "other", kind))
    with capture_logs() as logs:
        again = DiskTier.open(tmp_path / "other", other, 8)
    assert len(again) == 0
    assert logs[0]["dropped"] == {"foreign": 4 + 2 * layout.has_sinks}
    again.close()


def test_layouts_have_folders_of_their_own(tmp_path: Path) -> None:
    layouts = [a_layout(codec) for codec in CODECS]
    tiers = [DiskTier.open(tmp_path, one, 4) for one in layouts]
    for tier, layout in zip(tiers, layouts, strict=True):
        assert write(tier, layout, (1, 2)) == 2
    for tier, layout in zip(tiers, layouts, strict=True):
        expect_content(tier, layout, (1, 2), 2)
        tier.close()
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == sorted(layout.fingerprint.hex()[:32] for layout in layouts)


def test_nobody_else_may_read_what_prompts_have_left(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    folder = tmp_path / layout.fingerprint.hex()[:32]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_two_stores_never_share_a_folder(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    with pytest.raises(UnavailableError, match="in use by another store"):
        DiskTier.open(tmp_path, layout, 8)
    expect_content(tier, layout, (1, 2, 3), 3)
    tier.close()
    DiskTier.open(tmp_path, layout, 8).close()
    tier._resources = DiskTier.open(tmp_path, layout, 8)._resources  # for the fixture to close


@pytest.mark.parametrize("name", ["with space", "üñí 🗄", "-rf", "a\nb", "%s{0}", "x" * 200, "deep/er/still"])
def test_odd_paths(tmp_path: Path, name: str) -> None:
    layout = a_layout()
    for blocks in (0, 1):
        tier = DiskTier.open(tmp_path / name, layout, 2)
        expect_content(tier, layout, (1,), blocks)
        assert write(tier, layout, (1,)) == 1
        tier.close()


def test_a_folder_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        DiskTier.open(tmp_path / "file", a_layout(), 2)


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    layout = a_layout("raw")
    DiskTier.open(tmp_path, layout, 2).close()
    file_of(tmp_path).rename(tmp_path / "elsewhere")
    file_of(tmp_path).symlink_to(tmp_path / "elsewhere")
    for _ in range(2):  # and the lock is given back
        with pytest.raises(OSError, match="blocks"):
            DiskTier.open(tmp_path, layout, 2)


def test_fewer_slots_than_before(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    kill(tier)
    again = DiskTier.open(tmp_path, layout, 2)
    assert file_of(tmp_path).stat().st_size == 2 * slot_bytes(layout)
    expect_content(again, layout, (1, 2, 3), 2)
    assert write(again, layout, (5, 6)) == 2
    expect_content(again, layout, (5, 6), 2)
    again.close()


def test_a_disk_that_is_full_before_the_slots_are(tmp_path: Path, layout: Layout, tier: DiskTier) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = file_of(tmp_path).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        with capture_logs() as logs:
            for number in range(5, 9):  # in all slots that are free
                assert write(tier, layout, (number,)) == 0
            assert len(tier) == 4
            expect_content(tier, layout, (1, 2, 3), 3)
            expect_content(tier, layout, (4,), 1)
            assert tier.counts.slots_lost == 4 * (1 + layout.has_sinks)
            assert write(tier, layout, (1, 2, 9)) == 3  # in the slot of another block
            expect_content(tier, layout, (1, 2, 9), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [log["event"] for log in logs] == ["disk.write_failed", "disk.write_recovered"]
    assert tier.counts.failed == 4
    assert len(tier) == 4
    kill(tier)
    again = DiskTier.open(tmp_path, layout, 8)
    expect_content(again, layout, (1, 2, 9), 3)
    assert write(again, layout, (5, 6, 7, 8)) == 4
    assert len(again) == 8
    again.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_nothing_goes_on_serving(
    tmp_path: Path, layout: Layout, tier: DiskTier, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    assert write(tier, layout, (5, 6, 7, 8)) == 4
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr("zipserve.kvstore.slots.os", SimpleNamespace(**{**vars(os), "pwrite": pwrite}))
        for number in range(10, 30):
            assert write(tier, layout, (number,)) == 0
        is_short_of_sinks = code == errno.ENOSPC and layout.has_sinks  # then a sequence makes room for those of others
        assert len(tier) == (5 if is_short_of_sinks else 7), "only one block makes room, or one sequence"
        expect_content(tier, layout, (5, 6, 7, 8), 4)
    assert [log["event"] for log in logs] == ["disk.write_failed"]
    assert (tier.counts.failed, tier.counts.slots_lost) == (20, 5 if is_short_of_sinks else 0)
    assert write(tier, layout, (9,)) == 1
    expect_content(tier, layout, (9,), 1)


def test_a_disk_that_cannot_be_read(tier: DiskTier, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("zipserve.kvstore.slots.os", SimpleNamespace(**{**vars(os), "preadv": preadv}))
    with pytest.raises(TransferError, match="cannot be read"):
        read(tier, layout, tier.find(names_of((1,)))[0])


def test_what_is_read_or_written_is_not_evicted(tmp_path: Path, layout: Layout) -> None:
    tier = DiskTier.open(tmp_path, layout, 3)
    assert write(tier, layout, (1, 2)) == 2
    run = tier.find(names_of((1, 2)))
    held = tier.hold(run)
    name = names_of((3,))[0]
    refs, slabs = sealed(layout, name, 0)
    reservation = tier.reserve([], name, refs, INCARNATION)
    assert reservation is not None
    with pytest.raises(InternalError, match="while another one is"):
        tier.reserve([], names_of((4,))[0], refs, INCARNATION)
    tier.store(reservation, slabs)
    assert tier.commit(reservation)
    assert write(tier, layout, (5,)) == 1
    assert [len(tier.find(names_of(path))) for path in ((1, 2), (3,), (5,))] == [2, 0, 1]
    other = tier.hold(tier.find(names_of((5,))))
    assert write(tier, layout, (6,)) == 0, "all slots are in use"
    tier.release(held)
    assert write(tier, layout, (6,)) == 1
    expect_content(tier, layout, (5,), 1)
    tier.release(other)
    tier.close()


def test_a_block_is_not_written_twice_nor_behind_one_that_is_gone(layout: Layout, tier: DiskTier) -> None:
    names = names_of((1, 2, 3))
    run = tier.find(names)
    refs, slabs = sealed(layout, names[2], 2)
    assert tier.reserve(run[:2], names[2], refs, INCARNATION) is None
    tier.discard(run[1], BlockCorruptError("as a test says"))
    assert tier.reserve(run[:2], names[2], refs, INCARNATION) is None
    refs, slabs = sealed(layout, names[1], 1)
    reservation = tier.reserve(run[:1], names[1], refs, INCARNATION)
    assert reservation is not None
    tier.discard(run[0], BlockCorruptError("as a test says"))  # while it is written
    tier.store(reservation, slabs)
    assert not tier.commit(reservation)
    assert set(tier.index.entries()) == {(names_of((4,))[0], b"")}
    assert write(tier, layout, (1, 2, 3, 4, 5, 6, 7)) == 7


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_write_can_be_abandoned(tmp_path: Path, layout: Layout, tier: DiskTier, is_stored: bool) -> None:
    name = names_of((5,))[0]
    refs, slabs = sealed(layout, name, 0)
    reservation = tier.reserve([], name, refs, INCARNATION)
    assert reservation is not None
    if is_stored:
        tier.store(reservation, slabs)
    tier.abandon(reservation)
    with pytest.raises(InternalError, match="ended before"):
        tier.abandon(reservation)
    tier._pools.check_integrity()
    assert write(tier, layout, (5,), generation=9) == 1
    expect_content(tier, layout, (5,), 1, generation=9)
    tier.discard(tier.find([name])[0], BlockCorruptError("as a test says"))
    tier.close()
    again = DiskTier.open(tmp_path, layout, 8)
    assert len(again) == 4
    assert write(again, layout, (6, 7, 8, 9)) == 4
    tier._resources = again._resources  # for the fixture to close


def test_a_write_does_not_end_before_its_thread(
    layout: Layout, tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = names_of((5,))[0]
    refs, slabs = sealed(layout, name, 0)
    reservation = tier.reserve([], name, refs, INCARNATION)
    assert reservation is not None
    refused: list[bool] = []
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        with pytest.raises(InternalError, match="still going on"):
            tier.abandon(reservation)
        refused.append(True)
        return real(descriptor, data, offset)

    monkeypatch.setattr("zipserve.kvstore.slots.os", SimpleNamespace(**{**vars(os), "pwrite": pwrite}))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(tier.store, reservation, slabs).result()
    assert refused
    assert tier.commit(reservation)
    expect_content(tier, layout, (5,), 1)


IDENTITIES = st.builds(
    SlabIdentity,
    kind=st.sampled_from(SlabKind),
    fingerprint=st.binary(min_size=32, max_size=32),
    incarnation=st.integers(0, 2**64 - 1),
    generation=st.integers(0, 2**64 - 1),
    start_position=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 2**32 - 1),
    payload_bytes=st.integers(0, 2**64 - 1),
    prefix_hash=st.binary(min_size=32, max_size=32),
)


@given(
    IDENTITIES,
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 8 * FIELDS_BYTES - 1),
)
def test_records(identity: SlabIdentity, parent: bytes, checksum: int, sinks_checksum: int, bit: int) -> None:
    record = Record(identity, parent if identity.start_position else b"", checksum, sinks_checksum)
    page = bytearray(record.pack())
    assert len(page) == RECORD_BYTES
    assert Record.unpack(bytes(page)) == record
    page[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BlockCorruptError):
        Record.unpack(bytes(page))
    assert Record.unpack(NO_RECORD) is None
