"""PrefixIndex under any order of calls, against a model of who holds what."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zipserve.common.kv.eviction import Duel
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools, Slabs
from zipserve.common.kv.prefix_index import CachedBlock, PrefixIndex
from zipserve.v1.kv_pb2 import BlockRef

BLOCK = 64
LENGTH = 4


def a_pool(codec: str = "zip-4/32", blocks: int = 8, sinks: int = 4) -> SlabPools:
    return SlabPools(Layout("m", "0", 1, 1, 16, 16, "float32", codec, BLOCK), blocks=blocks, tails=1, sinks=sinks)


def names_of(path: tuple[int, ...]) -> list[bytes]:
    """Names of the blocks of a sequence whose blocks have these contents."""
    return [bytes(path[: i + 1]) for i in range(len(path))]


def refs_of(slabs: Slabs, block: int) -> list[BlockRef]:
    sinks = [BlockRef(kind=SlabKind.SINKS.value, slab=slab) for slab in slabs.sinks if not block]  # type: ignore[arg-type]
    return [*sinks, BlockRef(kind=SlabKind.BLOCK.value, slab=slabs.blocks[block])]  # type: ignore[arg-type]  # our enum


class Sequence:
    """Holds slabs for its blocks, the first of which it has found."""

    def __init__(self, path: tuple[int, ...], run: list[CachedBlock], slabs: Slabs) -> None:
        self.path, self.run, self.slabs = path, run, slabs


PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=LENGTH).map(tuple)


class CountingPools(SlabPools):
    """Counts how often somebody looks at a slab."""

    looks = 0

    def is_idle(self, kind: SlabKind, slab: int) -> bool:
        self.looks += 1
        return super().is_idle(kind, slab)


class CountingDuel(Duel):
    """Counts how often somebody asks what a block is worth."""

    asked = 0

    def keeps(self, name: bytes) -> bool:
        self.asked += 1
        return super().keeps(name)


class IndexMachine(RuleBasedStateMachine):
    """Sequences come, take what is there, publish block after block, and go in any order."""

    @initialize(
        codec=st.sampled_from(["raw", "zip-4/32"]),
        blocks=st.integers(LENGTH, 9),
        sinks=st.integers(1, 4),
        blocks_max=st.sampled_from([None, None, 0, 1, 3]),
    )
    def start(self, codec: str, blocks: int, sinks: int, blocks_max: int | None) -> None:
        self.pools = a_pool(codec, blocks, sinks)
        self.index = PrefixIndex(self.pools, blocks_max)
        self.evicted: list[bytes] = []
        self.freed: list[tuple[SlabKind, int]] = []
        self.index.on_removed = lambda block: self.evicted.append(block.name)
        self.pools.on_free = lambda kind, slab: self.freed.append((kind, slab))
        self.blocks_max = blocks if blocks_max is None else blocks_max
        self.sequences: list[Sequence] = []
        self.content: dict[tuple[SlabKind, int, int], bytes] = {}
        """Of every slab of a generation that was published."""

    @rule(path=PATHS)
    def come(self, path: tuple[int, ...]) -> None:
        names = names_of(path)
        run = self.index.find(names)
        assert [block.name for block in run] == names[: len(run)]
        for block in run:
            for kind, slab in block.slabs:
                assert self.content[kind, slab, self.pools.generation(kind, slab)] == block.name, "other tokens"
        slabs = self.index.hold(run)
        missing = self.pools.missing(slabs, len(path) * BLOCK)
        if not self.pools.can_have(missing):
            self.pools.give_back(slabs)
            return
        held_before = {block.name for block in self.index._blocks.values()}
        self.evicted.clear()
        self.index.note_request(names)
        assert self.pools.try_extend(slabs, len(path) * BLOCK)
        assert set(self.evicted) == held_before - self.index._blocks.keys()
        assert set(self.evicted).isdisjoint(names[: len(run)])
        self.sequences.append(Sequence(path, run, slabs))

    @rule(data=st.data(), joins=st.booleans())
    def publish(self, data: st.DataObject, joins: bool) -> None:
        growing = [sequence for sequence in self.sequences if len(sequence.run) < len(sequence.path)]
        if not growing:
            return
        sequence = data.draw(st.sampled_from(growing))
        block = len(sequence.run)
        name, known = names_of(sequence.path)[block], self.index._blocks.keys()
        is_known = name in known
        is_gone = bool(sequence.run) and self.index._blocks.get(sequence.run[-1].name) is not sequence.run[-1]
        refs = refs_of(sequence.slabs, block)
        if self.index.extend(sequence.run, name, refs):
            assert not is_known
            assert not is_gone
            assert sequence.run[-1] is self.index._blocks[name]
            for ref in refs:
                kind = SlabKind(ref.kind)
                self.content[kind, ref.slab, self.pools.generation(kind, ref.slab)] = name
        else:
            assert len(sequence.run) == block
            assert is_known or is_gone or len(self.index) == self.blocks_max
            if joins and self.index.join(sequence.run, name, sequence.slabs):
                assert is_known
                assert not is_gone
                assert sequence.run[-1] is self.index._blocks[name]
                assert sequence.slabs.of_block(block) == list(sequence.run[-1].slabs)
            elif joins:
                assert not is_known or is_gone
                assert len(sequence.run) == block

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        if self.sequences:
            sequence = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
            self.pools.give_back(sequence.slabs)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        if len(self.index):
            block = data.draw(st.sampled_from(sorted(self.index._blocks.values(), key=lambda block: block.name)))
            behind = {one.name for one in self.index if one.name.startswith(block.name)}
            assert {one.name for one in self.index.discard(block)} == behind
            assert behind.isdisjoint(self.index._blocks)
            assert self.index.discard(block) == []

    @invariant()
    def books_balance(self) -> None:
        self.index.check_integrity()
        self.pools.check_integrity()
        listed = [block.name for block in self.index]
        assert sorted(listed) == sorted(self.index._blocks)
        assert all(name[:-1] in listed[:i] for i, name in enumerate(listed) if len(name) > 1), "parents come first"
        for kind in (SlabKind.BLOCK, SlabKind.SINKS):
            held = {slab for sequence in self.sequences for slab in sequence.slabs.of(kind)}
            count = self.pools.blocks.count if kind is SlabKind.BLOCK else self.pools.sinks.count
            assert self.pools.available(kind) == count - len(held)

    def teardown(self) -> None:
        for sequence in getattr(self, "sequences", []):
            self.pools.give_back(sequence.slabs)
        if hasattr(self, "index"):
            self.index.make_room({SlabKind.BLOCK: self.pools.blocks.count, SlabKind.SINKS: self.pools.sinks.count})
            assert len(self.index) == 0
            assert self.pools.free(SlabKind.BLOCK) == self.pools.blocks.count


IndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPrefixIndex = IndexMachine.TestCase


def filled(pools: SlabPools, *paths: tuple[int, ...]) -> PrefixIndex:
    """An index of these sequences, in this order, which nobody uses any more."""
    index = PrefixIndex(pools)
    for path in paths:
        names = names_of(path)
        run = index.find(names)
        slabs = index.hold(run)
        index.note_request(names)
        assert pools.try_extend(slabs, len(path) * BLOCK)
        for block in range(len(run), len(path)):
            assert index.extend(run, names[block], refs_of(slabs, block))
        pools.give_back(slabs)
    return index


def test_a_slab_is_freed_when_the_last_holder_has_given_it_back() -> None:
    pools = a_pool()
    freed: list[tuple[SlabKind, int]] = []
    pools.on_free = lambda kind, slab: freed.append((kind, slab))
    index = filled(pools, (1, 2))
    held = index.hold(index.find(names_of((1, 2))))
    (block,) = index.find(names_of((1,)))
    assert freed == []
    index.discard(block)
    assert (freed, len(index)) == ([], 0)
    pools.give_back(held)
    assert sorted(freed) == [(SlabKind.BLOCK, 0), (SlabKind.BLOCK, 1), (SlabKind.SINKS, 0)]


def test_the_end_of_the_sequence_that_was_not_used_for_longest_leaves_first() -> None:
    index = filled(a_pool(blocks=8), (1, 2, 3), (4, 5, 6), (1, 2))
    index.make_room({SlabKind.BLOCK: 5})
    assert [len(index.find(names_of(path))) for path in ((1, 2, 3), (4, 5, 6))] == [2, 1]


def test_room_for_sinks_is_made_by_whole_sequences() -> None:
    index = filled(a_pool(blocks=8, sinks=2), (1, 2, 3), (4, 5))
    index.make_room({SlabKind.SINKS: 1})
    assert [len(index.find(names_of(path))) for path in ((1, 2, 3), (4, 5))] == [0, 2]


def cost_of_evicting(blocks: int, leader: int, uses: int) -> tuple[int, int]:
    """How many slabs are looked at, and how many blocks' worth is asked for, to evict one of `blocks` blocks.

    Args:
        leader: which of the two rules decides.
        uses: how often each of them has been asked for before it came.
    """
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", "raw", BLOCK)
    pools = CountingPools(layout, blocks=blocks, tails=1, sinks=1)
    index = PrefixIndex(pools)
    duel = index._duel = CountingDuel(blocks, index._blocks)
    for number in range(blocks + 3):
        name = b"%d" % number
        for _ in range(uses if number < blocks else 0):
            index.note_request([name])
        duel._leader = duel._players[leader]
        pools.looks = duel.asked = 0
        index.make_room({SlabKind.BLOCK: 1})
        slabs = Slabs()
        assert pools.try_extend(slabs, BLOCK)
        assert index.extend([], name, refs_of(slabs, 0))
        pools.give_back(slabs)
    assert len(index) == blocks
    return pools.looks, duel.asked


@pytest.mark.parametrize("leader", [0, 1])
@pytest.mark.parametrize("uses", [0, 1, 2])
def test_what_it_costs_to_evict_a_block_does_not_grow_with_their_number(leader: int, uses: int) -> None:
    few, many = cost_of_evicting(10, leader, uses), cost_of_evicting(2_000, leader, uses)
    assert 0 < few[0] < 10
    assert many == few


def test_blocks_behind_many_others_leave_first_one_by_one() -> None:
    index = filled(a_pool("raw", blocks=6), (1, 2, 3), (1, 4, 5), (6,))
    evicted: list[bytes] = []
    index.on_removed = lambda block: evicted.append(block.name)
    index.make_room({SlabKind.BLOCK: 6})
    assert sorted(evicted) == sorted([*names_of((1, 2, 3)), *names_of((1, 4, 5))[1:], *names_of((6,))])
    left_at = {name: i for i, name in enumerate(evicted)}
    assert all(left_at[name] < left_at[name[:-1]] for name in evicted if len(name) > 1)


@pytest.mark.parametrize("defect", ["orphan", "name", "use", "bound", "spare"])
def test_integrity_check_can_fail(defect: str) -> None:
    pools = a_pool()
    index = filled(pools, (1, 2))
    first, second = index.find(names_of((1, 2)))
    if defect == "orphan":
        del index._blocks[first.name]
    elif defect == "name":
        first.children.clear()
    elif defect == "use":
        pools.blocks.share([second.slabs[-1][1]])
    elif defect == "bound":
        index._blocks_max = 1
    else:
        index._duel.came(b"not here")
    with pytest.raises(AssertionError):
        index.check_integrity()
