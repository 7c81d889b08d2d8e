"""What a cache keeps: never worse than least recently used, far better under a scan."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import TRACES, Trace
from zipserve.common.kv.eviction import Duel, Lru, Rule, S3Fifo
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.v1.kv_pb2 import SLAB_KIND_BLOCK, BlockRef

NAMES = st.integers(0, 12).map(lambda number: bytes([number]))


@pytest.mark.parametrize("rule", [Lru, lambda: S3Fifo(4)])
@given(st.lists(NAMES, max_size=60), st.integers(1, 6))
def test_a_rule_takes_out_what_was_put_in_once(rule: Callable[[], Rule], asked: list[bytes], capacity: int) -> None:
    order, held = rule(), set[bytes]()
    for name in asked:
        if name in held:
            order.use(name)
        else:
            order.add(name)
            held.add(name)
        if len(held) > capacity:
            held.remove(order.pop())
    while held:
        held.remove(order.pop())


def test_lru_is_by_last_use() -> None:
    lru = Lru()
    for name in (b"a", b"b", b"c"):
        lru.add(name)
    lru.use(b"a")
    assert [lru.pop() for _ in range(3)] == [b"b", b"c", b"a"]


def test_s3_fifo_keeps_what_was_asked_for_twice() -> None:
    rule = S3Fifo(4)
    for name in (b"a", b"b", b"c"):
        rule.add(name)
    rule.use(b"a")
    assert [rule.pop(), rule.pop()] == [b"b", b"c"]
    rule.add(b"b")  # comes back, and is known
    rule.add(b"d")
    assert [rule.pop() for _ in range(3)] == [b"d", b"a", b"b"]


def test_s3_fifo_forgets_after_some_names() -> None:
    rule = S3Fifo(1)
    for name in (b"a", b"b"):
        rule.add(name)
        rule.pop()
    rule.add(b"a")
    assert rule._ghosts.keys() == {b"b"}
    assert list(rule._small) == [b"a"]


class _ByAge(Duel):
    """With this, an index evicts what was not used for longest."""

    def keeps(self, name: bytes) -> bool:
        return True

    def spare(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize("name", TRACES)
def test_hits_at_least_as_often_as_least_recently_used(name: str) -> None:
    make, capacity = TRACES[name]
    trace = make()
    lru, ours = _hit_rate(trace, capacity, _ByAge), _hit_rate(trace, capacity, Duel)
    assert 0 < lru < 1
    assert ours >= (1.5 * lru if name == "scan" else lru)


def test_a_duel_is_followed_when_the_traffic_changes() -> None:
    duel = Duel(10)
    for i in range(200):  # two that come again and again, among many that do not
        duel.request([b"hot", b"hot 2"])
        duel.request([b"%d %d" % (i, j) for j in range(12)])
    assert duel.keeps(b"hot 2")
    for i in range(2000):
        duel.request([b"%d" % (i // 2)])
    assert duel.keeps(b"999")


def _hit_rate(trace: Trace, capacity: int, rule: type[Duel]) -> float:
    """Hit rate of a PrefixIndex, used as a prefill worker uses it."""
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", "raw", 16)
    pools = SlabPools(layout, blocks=capacity, tails=1, sinks=1)
    index, hits = PrefixIndex(pools), 0
    index._duel = rule(capacity, index._blocks)
    for names in trace:
        run = index.find(names)
        hits += len(run)
        slabs = index.hold(run)
        index.note_request(names)
        index.make_room({SlabKind.BLOCK: len(names) - len(run)})
        assert pools.try_extend(slabs, len(names) * 16)
        for i in range(len(run), len(names)):
            assert index.extend(run, names[i], [BlockRef(kind=SLAB_KIND_BLOCK, slab=slabs.blocks[i])])
        pools.give_back(slabs)
    index.check_integrity()
    pools.check_integrity()
    return hits / sum(map(len, trace))
