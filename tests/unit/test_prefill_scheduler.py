"""PrefillScheduler under any order of calls: first come first served, no slab twice, all slabs back in the end."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.prefill.scheduler import Job, Planned, PrefillScheduler

BLOCK = 64
KINDS = (SlabKind.BLOCK, SlabKind.TAIL, SlabKind.SINKS)


def pools_of(codec: str, blocks: int, tails: int, sinks: int) -> SlabPools:
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", codec, BLOCK)
    return SlabPools(layout, blocks=blocks, tails=tails, sinks=sinks)


class PrefillMachine(RuleBasedStateMachine):
    """Jobs come, wait, are computed, and give their slabs back, in any order."""

    @initialize(
        codec=st.sampled_from(["raw", "zip-4/32"]),
        blocks=st.integers(1, 8),
        tails=st.integers(1, 3),
        sinks=st.integers(1, 3),
        slots=st.integers(1, 3),
        batch=st.sampled_from([1, 160, 400]),
    )
    def start(self, codec: str, blocks: int, tails: int, sinks: int, slots: int, batch: int) -> None:
        self.has_sinks = codec != "raw"
        self.batch_tokens_max = batch
        self.pools = pools_of(codec, blocks, tails, sinks)
        self.scheduler: PrefillScheduler[int] = PrefillScheduler(
            self.pools, slots=slots, batch_tokens_max=batch, queue_requests_max=5, queue_tokens_max=800
        )
        self.waiting: list[Job[int]] = []
        self.computing: list[Planned[int]] = []
        self.leased: list[Planned[int]] = []
        self.now_s = 0.0
        self.count = 0
        self.seen_generations: set[tuple[SlabKind, int]] = set()

    @rule(tokens=st.integers(1, 640), patience_s=st.sampled_from([1.0, 5.0, 1e9]))
    def submit(self, tokens: int, patience_s: float) -> None:
        job = Job(tokens, self.now_s + patience_s, self.count)
        queued = sum(j.tokens for j in self.waiting)
        if tokens // BLOCK > self.pools.blocks.count:
            with pytest.raises(InvalidRequestError, match=f"{tokens} tokens needs {tokens // BLOCK} KV blocks"):
                self.scheduler.submit(job)
        elif len(self.waiting) >= 5:
            with pytest.raises(OverloadedError, match="5 requests wait, the limit is 5"):
                self.scheduler.submit(job)
        elif self.waiting and queued + tokens > 800:
            with pytest.raises(OverloadedError, match=f"{queued} tokens wait and {tokens} came, the limit is 800"):
                self.scheduler.submit(job)
        else:
            self.scheduler.submit(job)
            self.waiting.append(job)
            self.count += 1

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def next_batch(self) -> None:
        free = [*self._free(), self.scheduler._slots.free]
        batch = self.scheduler.next_batch(self.now_s)
        taken = sorted([*[p.job.payload for p in batch.planned], *[j.payload for j in batch.expired]])
        assert taken == [job.payload for job in self.waiting[: len(taken)]], "somebody was overtaken"
        del self.waiting[: len(taken)]
        assert [p.job.payload for p in batch.planned] == sorted(p.job.payload for p in batch.planned)
        assert all(self.now_s >= job.deadline_s for job in batch.expired)
        assert all(self.now_s < planned.job.deadline_s for planned in batch.planned)
        assert len(batch.planned) <= 1 or sum(p.job.tokens for p in batch.planned) <= self.batch_tokens_max
        for planned in batch.planned:
            self._check(planned)
        self.computing += batch.planned
        if self.waiting and not batch.planned:
            head = self.waiting[0]
            needs = [*self._needs(head.tokens), 1]
            assert any(n > f for n, f in zip(needs, free, strict=True)), "the head could have been computed"

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.waiting:
            job = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
            assert self.scheduler.cancel(job)
            assert not self.scheduler.cancel(job)

    @precondition(lambda self: self.computing)
    @rule()
    def computed(self) -> None:
        planned = self.computing.pop(0)
        assert not self.scheduler.cancel(planned.job), "it does not wait any more"
        self.scheduler.free_slot(planned.slot)
        self.leased.append(planned)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def lease_ends(self, data: st.DataObject) -> None:
        planned = self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1)))
        self.pools.give_back(planned.slabs)
        assert list(planned.slabs) == [], "it could be given back twice"

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.queued_requests == len(self.waiting)
        assert self.scheduler.queued_tokens == sum(job.tokens for job in self.waiting)
        for kind, allocator in zip(KINDS, (self.pools.blocks, self.pools.tails, self.pools.sinks), strict=True):
            held = [slab for planned in self.computing + self.leased for slab in planned.slabs.of(kind)]
            assert len(set(held)) == len(held), f"a slab of {kind.name} was given out twice"
            assert allocator.free + len(held) == allocator.count
        slots = [planned.slot for planned in self.computing]
        assert len(set(slots)) == len(slots)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.waiting or self.computing or self.leased:
            while self.computing:
                self.computed()
            for planned in self.leased:
                self.pools.give_back(planned.slabs)
            self.leased.clear()
            before = len(self.waiting)
            self.next_batch()
            assert len(self.waiting) < before or not before, "with all slabs free nobody may wait for ever"
        for allocator in (self.pools.blocks, self.pools.tails, self.pools.sinks, self.scheduler._slots):
            assert allocator.free == allocator.count

    def _check(self, planned: Planned[int]) -> None:
        assert [len(planned.slabs.of(kind)) for kind in KINDS] == self._needs(planned.job.tokens)
        kinds = [kind for kind, _ in planned.slabs]
        names = list(zip(kinds, planned.generations, strict=True))
        assert self.seen_generations.isdisjoint(names), "a generation was given out twice"
        self.seen_generations.update(names)

    def _needs(self, tokens: int) -> list[int]:
        """Slabs of each of KINDS."""
        full, rest = divmod(tokens, BLOCK)
        return [full, 1 if rest else 0, 1 if full and self.has_sinks else 0]

    def _free(self) -> list[int]:
        return [self.pools.blocks.free, self.pools.tails.free, self.pools.sinks.free]


PrefillMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPrefillScheduler = PrefillMachine.TestCase


def test_integrity_check_can_fail() -> None:
    scheduler: PrefillScheduler[int] = PrefillScheduler(
        pools_of("raw", 1, 1, 1), slots=1, batch_tokens_max=1, queue_requests_max=1, queue_tokens_max=1
    )
    scheduler.queued_tokens = 1
    with pytest.raises(AssertionError, match="queued_tokens"):
        scheduler.check_integrity()
