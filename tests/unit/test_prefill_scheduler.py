"""PrefillScheduler under any order of calls: who is first always advances, no slab twice, all slabs back in the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zipserve.common.errors import DeadlineError, InvalidRequestError, OverloadedError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.prefill.scheduler import Chunk, Job, PrefillScheduler

BLOCK = 64
KINDS = (SlabKind.BLOCK, SlabKind.TAIL, SlabKind.SINKS)


def pools_of(codec: str, blocks: int, tails: int, sinks: int) -> SlabPools:
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", codec, BLOCK)
    return SlabPools(layout, blocks=blocks, tails=tails, sinks=sinks)


def rank(job: Job[int]) -> tuple[int, int]:
    return -job.priority, job.payload


class PrefillMachine(RuleBasedStateMachine):
    """Jobs come, wait, are computed in chunks, are cancelled at any time, and give their slabs back, in any order."""

    @initialize(
        codec=st.sampled_from(["raw", "zip-4/32"]),
        blocks=st.integers(1, 8),
        tails=st.integers(1, 3),
        sinks=st.integers(1, 3),
        slots=st.integers(1, 3),
        step_tokens=st.sampled_from([1, 160, 400]),
    )
    def start(self, codec: str, blocks: int, tails: int, sinks: int, slots: int, step_tokens: int) -> None:
        self.has_sinks = codec != "raw"
        self.step_tokens = step_tokens
        self.pools = pools_of(codec, blocks, tails, sinks)
        self.scheduler: PrefillScheduler[int] = PrefillScheduler(
            self.pools, slots=slots, step_tokens=step_tokens, queue_requests_max=5, queue_tokens_max=800
        )
        self.waiting: list[Job[int]] = []
        self.started: list[Job[int]] = []
        self.leased: list[Job[int]] = []
        self.now_s = 0.0
        self.count = 0
        self.seen_generations: set[tuple[SlabKind, int]] = set()

    @rule(tokens=st.integers(1, 640), patience_s=st.sampled_from([1.0, 5.0, 1e9]), priority=st.integers(0, 1))
    def submit(self, tokens: int, patience_s: float, priority: int) -> None:
        job = Job(tokens, self.now_s + patience_s, self.count, priority)
        queued = sum(j.tokens for j in self.waiting)
        if tokens // BLOCK > self.pools.blocks.count:
            with pytest.raises(InvalidRequestError, match=f"{tokens} tokens needs {tokens // BLOCK} KV blocks"):
                self.scheduler.submit(job, self.now_s)
        elif len(self.waiting) >= 5:
            with pytest.raises(OverloadedError, match="5 requests wait, the limit is 5"):
                self.scheduler.submit(job, self.now_s)
        elif self.waiting and queued + tokens > 800:
            with pytest.raises(OverloadedError, match=f"{queued} tokens wait and {tokens} came, the limit is 800"):
                self.scheduler.submit(job, self.now_s)
        else:
            self.scheduler.submit(job, self.now_s)
            self.waiting.append(job)
            self.count += 1

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def step(self) -> None:
        free = [*self._free(), self.scheduler.slots.free]
        step = self.scheduler.next_step(self.now_s)
        for job in step.late:
            assert self.now_s >= job.deadline_s
            self._forget(job)
        here = sorted((*self.started, *self.waiting), key=rank)
        assert all(self.now_s < job.deadline_s for job in here)
        for chunk in step.chunks:
            if chunk.job in self.waiting:
                self.waiting.remove(chunk.job)
                self.started.append(chunk.job)
                self._check(chunk.job)
        assert sum(chunk.tokens for chunk in step.chunks) <= self.step_tokens
        if here:
            self._check_head(here[0], step.chunks, free)
        self.scheduler.advance(step.chunks, 1e-6, self.now_s)
        for chunk in step.chunks:
            if chunk.job.computed == chunk.job.tokens:
                self.started.remove(chunk.job)
                self.leased.append(chunk.job)
                assert not self.scheduler.remove(chunk.job), "it is not here any more"

    def _check_head(self, head: Job[int], chunks: list[Chunk[int]], free: list[int]) -> None:
        """Whoever is first advances by half a step at least, unless its slabs are not free; then nobody else starts."""
        of_head = sum(chunk.tokens for chunk in chunks if chunk.job is head)
        if of_head:
            assert of_head >= min(head.left, self.step_tokens / 2)
        else:
            needs = [*self._needs(head.tokens), 1]
            assert any(n > f for n, f in zip(needs, free, strict=True)), "the first one could have been started"
            assert all(chunk.job.computed for chunk in chunks), "the first one was overtaken"

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        here = self.waiting + self.started
        if here:
            job = data.draw(st.sampled_from(here))
            assert self.scheduler.remove(job)
            assert not self.scheduler.remove(job)
            self._forget(job)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def lease_ends(self, data: st.DataObject) -> None:
        job = self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1)))
        self.pools.give_back(job.slabs)
        assert list(job.slabs) == [], "it could be given back twice"

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.queued_requests == len(self.waiting)
        assert self.scheduler.running_requests == len(self.started)
        assert self.scheduler.queued_tokens == sum(job.tokens for job in self.waiting)
        for kind, allocator in zip(KINDS, (self.pools.blocks, self.pools.tails, self.pools.sinks), strict=True):
            held = [slab for job in self.started + self.leased for slab in job.slabs.of(kind)]
            assert len(set(held)) == len(held), f"a slab of {kind.name} was given out twice"
            assert allocator.free + len(held) == allocator.count
        slots = [job.slot for job in self.started]
        assert len(set(slots)) == len(slots)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.waiting or self.started or self.leased:
            for job in self.leased:
                self.pools.give_back(job.slabs)
            self.leased.clear()
            left = [job.left for job in (*self.waiting, *self.started)]
            self.step()
            assert sum(left) > sum(job.left for job in (*self.waiting, *self.started)) or not left, "nobody advances"
        for allocator in (self.pools.blocks, self.pools.tails, self.pools.sinks, self.scheduler.slots):
            assert allocator.free == allocator.count

    def _forget(self, job: Job[int]) -> None:
        assert (job in self.waiting) != (job in self.started)
        (self.waiting if job in self.waiting else self.started).remove(job)
        self.pools.give_back(job.slabs)

    def _check(self, job: Job[int]) -> None:
        assert [len(job.slabs.of(kind)) for kind in KINDS] == self._needs(job.tokens)
        names = list(zip((kind for kind, _ in job.slabs), job.generations, strict=True))
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


def a_scheduler(step_tokens: int = 256, blocks: int = 1000) -> PrefillScheduler[int]:
    return PrefillScheduler(
        pools_of("raw", blocks, 100, 1),
        slots=32,
        step_tokens=step_tokens,
        queue_requests_max=100,
        queue_tokens_max=1 << 20,
    )


def run_step(scheduler: PrefillScheduler[int], seconds: float = 0.0, now_s: float = 0.0) -> dict[int, int]:
    """Tokens by the payload of their job."""
    chunks = scheduler.next_step(now_s).chunks
    tokens = {chunk.job.payload: chunk.tokens for chunk in chunks}
    scheduler.advance(chunks, seconds, now_s + seconds)
    return tokens


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.lists(st.integers(1, 128), max_size=300))
def test_nobody_starves_behind_short_prompts(lengths: list[int], shorts: list[int]) -> None:
    """However many short prompts keep coming, a job ends after the steps that it and those before it take at half."""
    scheduler = a_scheduler(blocks=10_000)
    jobs = [Job(tokens, 1e9, -1) for tokens in lengths]
    for job in jobs:
        scheduler.submit(job, 0.0)
    steps = 0
    while jobs[-1].left:
        if steps < len(shorts):
            scheduler.submit(Job(shorts[steps], 1e9, steps), 0.0)
        run_step(scheduler)
        steps += 1
    assert steps <= sum(-(-tokens // 128) for tokens in lengths)


def test_a_short_prompt_behind_a_long_one_takes_one_step() -> None:
    scheduler = a_scheduler()
    scheduler.submit(Job(4000, 1e9, 0), 0.0)
    assert run_step(scheduler) == {0: 256}
    scheduler.submit(Job(100, 1e9, 1), 0.0)
    assert run_step(scheduler) == {0: 156, 1: 100}
    assert run_step(scheduler) == {0: 256}


def test_a_higher_priority_goes_first() -> None:
    scheduler = a_scheduler()
    for payload, priority in enumerate((0, 0, 7)):
        scheduler.submit(Job(300, 1e9, payload, priority), 0.0)
    assert [run_step(scheduler) for _ in range(4)] == [{2: 256}, {2: 44, 0: 212}, {0: 88, 1: 168}, {1: 132}]


def test_work_that_would_certainly_come_too_late_is_refused() -> None:
    scheduler = a_scheduler()
    scheduler.submit(Job(256, 0.001, 0), 0.0)
    assert run_step(scheduler, seconds=0.5) == {0: 256}, "nothing is known yet: it is tried"
    # 512 tokens/s were measured; twice that would still be too slow
    with pytest.raises(DeadlineError, match=r"2048 tokens takes 2.00 s at least, its deadline is in 1.90 s"):
        scheduler.submit(Job(2048, 2.5, 1), 0.6)
    scheduler.submit(Job(2048, 2.7, 2), 0.6)
    assert scheduler.next_step(0.6).late == []
    scheduler.submit(Job(2048, 33.0, 3), 31.0)  # what was measured so long ago says nothing


def test_what_can_no_longer_be_in_time_is_dropped() -> None:
    scheduler = a_scheduler()
    job = Job(1024, 1.2, 0)
    scheduler.submit(job, 0.0)
    assert run_step(scheduler, seconds=0.5, now_s=0.0) == {0: 256}
    step = scheduler.next_step(0.5)
    assert (step.late, step.chunks) == ([job], []), "768 tokens in 0.7 s are more than twice 512 tokens/s"
    scheduler.pools.give_back(job.slabs)
    scheduler.check_integrity()


@pytest.mark.parametrize("field", ["queued_tokens", "_started"])
def test_integrity_check_can_fail(field: str) -> None:
    scheduler = a_scheduler()
    setattr(scheduler, field, 1 if field == "queued_tokens" else [Job(1, 1.0, 0)])
    with pytest.raises(AssertionError, match=r"queued_tokens|have been started"):
        scheduler.check_integrity()
