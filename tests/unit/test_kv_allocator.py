"""SlabAllocator under any order of takes and returns, against a model of who holds what."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zipserve.common.errors import OverloadedError
from zipserve.common.kv.allocator import SlabAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """Holders take groups of slabs and give them back; the order in which slabs became free is written down."""

    @initialize(count=st.integers(1, 12))
    def start(self, count: int) -> None:
        self.slabs = SlabAllocator(count, "test slabs")
        self.free = list(range(count))
        self.held: list[list[int]] = []
        self.kept: set[int] = set()
        self.generations: dict[int, int] = {}
        self.newest = 0

    @rule(count=st.integers(0, 14))
    def take(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(OverloadedError, match=f"needs {count} test slabs, {len(self.free)} of "):
                self.slabs.take(count)
            return
        taken = self.slabs.take(count)
        assert taken == self.free[:count], "not the ones that have been free for longest"
        del self.free[:count]
        for slab in taken:
            generation = self.slabs.generation(slab)
            assert generation > self.newest, "a generation came back"
            self.newest = self.generations[slab] = generation
        if taken:
            self.held.append(taken)

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if self.held:
            group = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            freed = [slab for slab in group if not self._is_held(slab)]
            assert self.slabs.give_back(group) == freed
            self._note_free(freed)

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        if self.held:
            slab = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
            if slab in self.kept:
                with pytest.raises(KeyError, match="kept already"):
                    self.slabs.keep(slab)
            else:
                self.slabs.keep(slab)
                self.kept.add(slab)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.kept:
            slab = data.draw(st.sampled_from(sorted(self.kept)))
            self.kept.remove(slab)
            freed = [] if self._is_held(slab) else [slab]
            assert self.slabs.give_up(slab) == freed
            self._note_free(freed)
            with pytest.raises(KeyError):
                self.slabs.give_up(slab)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """Another holder of some slabs of a group: they keep their generation, and are free after both."""
        if self.held:
            group = data.draw(st.sampled_from(self.held))
            shared = group[: data.draw(st.integers(1, len(group)))]
            self.slabs.share(shared)
            self.held.append(shared)

    @rule(data=st.data())
    def share_what_is_free(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held)) if self.held else []
        with pytest.raises(KeyError):
            self.slabs.share([*held, data.draw(st.sampled_from([*self.free[:1], self.slabs.count]))])

    @rule(data=st.data())
    def give_back_wrongly(self, data: st.DataObject) -> None:
        """A slab twice, one that is free, one that does not exist: refused, and nothing else of the list is freed."""
        good = data.draw(st.sampled_from(self.held)) if self.held else []
        bad = data.draw(st.sampled_from([*self.free[:1], self.slabs.count, -1, *good[:1]]))
        wrong = [*good, bad]
        with pytest.raises(KeyError):
            self.slabs.give_back(wrong)

    @invariant()
    def books_balance(self) -> None:
        self.slabs.check_integrity()
        assert self.slabs.free == len(self.free)
        held = {slab for group in self.held for slab in group}
        assert self.slabs.idle == len(self.kept - held)
        assert len(held | self.kept) + len(self.free) == self.slabs.count
        assert {slab: self.slabs.generation(slab) for slab in held | self.kept} == self.generations
        for slab in self.free:
            with pytest.raises(KeyError):
                self.slabs.generation(slab)

    def teardown(self) -> None:
        for group in getattr(self, "held", []):
            self.slabs.give_back(group)
            self.slabs.check_integrity()
        for slab in getattr(self, "kept", ()):
            self.slabs.give_up(slab)
        assert not hasattr(self, "slabs") or self.slabs.free == self.slabs.count

    def _is_held(self, slab: int) -> bool:
        return slab in self.kept or any(slab in group for group in self.held)

    def _note_free(self, slabs: list[int]) -> None:
        for slab in slabs:
            self.free.append(slab)
            del self.generations[slab]


TestAllocator = AllocatorMachine.TestCase


def test_integrity_check_can_fail() -> None:
    """Otherwise the invariant above would say nothing."""
    twice, lost, both, nobodys, idle = (SlabAllocator(2) for _ in range(5))
    idle._idle = 1
    nobodys.take(1)
    nobodys._holders[0] = 0
    twice._free.append(0)
    lost._free.clear()
    both._generation[0] = both._holders[0] = 1
    for broken in (idle, twice, lost, both, nobodys):
        with pytest.raises(AssertionError):
            broken.check_integrity()
