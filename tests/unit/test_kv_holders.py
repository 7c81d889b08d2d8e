"""Holders against a model that keeps plain pairs and looks at all of them."""

from typing import TypeAlias

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zipserve.common.kv.holders import HolderKey, Holders

HOLDERS: list[HolderKey] = [("a", 1), ("a", 2), ("b", 1)]
Path: TypeAlias = tuple[int, ...]
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
HOLDER = st.sampled_from(HOLDERS)


def names_of(path: Path) -> list[bytes]:
    """Names of the blocks of a sequence whose blocks have these contents."""
    return [bytes(path[: i + 1]) for i in range(len(path))]


def parent_of(name: bytes) -> bytes:
    return name[:-1]


class HoldersMachine(RuleBasedStateMachine):
    """Blocks come and go, in and out of order, as they do over a stream that loses some."""

    def __init__(self) -> None:
        super().__init__()
        self.holders = Holders()
        self.pairs: set[tuple[HolderKey, bytes]] = set()

    def held(self, holder: HolderKey) -> set[bytes]:
        return {name for one, name in self.pairs if one == holder}

    @rule(holder=HOLDER, path=PATHS, data=st.data())
    def add(self, holder: HolderKey, path: Path, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, len(path)))
        names = names_of(path)[first:]
        new = self.holders.add(holder, bytes(path[:first]), names)
        assert new == [name for name in names if name not in self.held(holder)]
        self.pairs |= {(holder, name) for name in names}

    @rule(holder=HOLDER, names=st.lists(PATHS.map(bytes), max_size=5))
    def remove(self, holder: HolderKey, names: list[bytes]) -> None:
        self.holders.remove(holder, names)
        self.pairs -= {(holder, name) for name in names}

    @rule(holder=HOLDER, names=st.lists(PATHS.map(bytes), unique=True, max_size=8))
    def replace(self, holder: HolderKey, names: list[bytes]) -> None:
        new = self.holders.replace(holder, ((name, parent_of(name)) for name in names))
        assert new == [name for name in names if name not in self.held(holder)]
        self.pairs = {pair for pair in self.pairs if pair[0] != holder} | {(holder, name) for name in names}

    @rule(holder=HOLDER)
    def drop(self, holder: HolderKey) -> None:
        self.holders.drop(holder)
        self.pairs = {pair for pair in self.pairs if pair[0] != holder}

    @rule(path=PATHS)
    def runs(self, path: Path) -> None:
        names = names_of(path)
        expected = {}
        for holder in HOLDERS:
            missing = [i for i, name in enumerate(names) if (holder, name) not in self.pairs]
            expected[holder] = missing[0] if missing else len(names)
        assert self.holders.runs(names) == {holder: run for holder, run in expected.items() if run}
        assert self.holders.runs([]) == {}

    @rule(path=PATHS)
    def chain(self, path: Path) -> None:
        names = names_of(path)
        known = {name for _, name in self.pairs}
        assert self.holders.chain(names[-1]) == (names if known.issuperset(names) else [])

    @invariant()
    def everybody_has_what_he_should(self) -> None:
        for holder in HOLDERS:
            assert self.holders.names_of(holder) == self.held(holder)
        assert self.holders.holders() == {holder for holder, _ in self.pairs}
        assert len(self.holders) == len({name for _, name in self.pairs})

    @invariant()
    def nothing_else_is_kept(self) -> None:
        assert self.holders._blocks.keys() == {name for _, name in self.pairs}
        assert self.holders._names.keys() == {holder for holder, _ in self.pairs}
        for name, known in self.holders._blocks.items():
            assert known.holders == {holder for holder, held in self.pairs if held == name}


TestHolders = HoldersMachine.TestCase


def test_a_ring_is_no_chain() -> None:
    """Hashes cannot make one, but whoever can write to Redis can."""
    holders = Holders()
    holders.replace(("a", 1), [(b"1", b"3"), (b"2", b"1"), (b"3", b"2"), (b"4", b"4")])
    assert [holders.chain(name) for name in (b"1", b"2", b"3", b"4")] == [[]] * 4


def test_the_newest_word_about_a_parent_counts() -> None:
    holders = Holders()
    holders.add(("a", 1), b"", [b"1", b"2"])
    holders.add(("b", 1), b"", [b"2"])
    assert holders.chain(b"2") == [b"2"]
    holders.replace(("a", 1), [(b"1", b""), (b"2", b"1")])
    assert holders.chain(b"2") == [b"1", b"2"]
