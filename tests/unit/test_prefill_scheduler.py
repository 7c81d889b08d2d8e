"""PrefillScheduler under any order of calls: who is first always advances, no slab twice, all slabs back in the end.

Prompts of one family begin with the same tokens, so that they share blocks, some of which may be gone again.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zipserve.common.errors import DeadlineError, InvalidRequestError, OverloadedError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.prefill.scheduler import Chunk, Job, PrefillScheduler
from zipserve.v1.kv_pb2 import BlockRef

BLOCK = 64
KINDS = (SlabKind.BLOCK, SlabKind.TAIL, SlabKind.SINKS)


def pools_of(codec: str, blocks: int, tails: int, sinks: int) -> SlabPools:
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", codec, BLOCK)
    return SlabPools(layout, blocks=blocks, tails=tails, sinks=sinks)


def a_job(tokens: int, deadline_s: float, payload: int, priority: int = 0, family: int | None = None) -> Job[int]:
    """Without a family, its blocks are nobody else's."""
    job = Job(tokens, deadline_s, payload, priority)
    if family is not None:
        job.names = [bytes([family, block]) for block in range(tokens // BLOCK)]
        job.reusable_blocks = (tokens - 1) // BLOCK
    return job


def publish(index: PrefixIndex, job: Job[int]) -> None:
    """Puts the blocks that a job has computed into the index, as a worker does after a step."""
    for block in range(len(job.run), min(len(job.names), job.computed // BLOCK)):
        slabs = [(SlabKind.SINKS, slab) for slab in job.slabs.sinks if not block]
        slabs.append((SlabKind.BLOCK, job.slabs.blocks[block]))
        refs = [BlockRef(kind=kind.value, slab=slab) for kind, slab in slabs]  # type: ignore[arg-type]  # our enum
        if not index.extend(job.run, job.names[block], refs):
            break


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
        cached_max=st.sampled_from([None, None, 0, 2]),
    )
    def start(
        self, codec: str, blocks: int, tails: int, sinks: int, slots: int, step_tokens: int, cached_max: int | None
    ) -> None:
        self.has_sinks = codec != "raw"
        self.step_tokens = step_tokens
        self.pools = pools_of(codec, blocks, tails, sinks)
        self.index = PrefixIndex(self.pools, cached_max)
        self.scheduler: PrefillScheduler[int] = PrefillScheduler(
            self.index, slots=slots, step_tokens=step_tokens, queue_requests_max=5, queue_tokens_max=800
        )
        self.waiting: list[Job[int]] = []
        self.started: list[Job[int]] = []
        self.leased: list[Job[int]] = []
        self.now_s = 0.0
        self.count = 0
        self.seen_generations: set[tuple[SlabKind, int]] = set()

    @rule(
        tokens=st.integers(1, 640),
        patience_s=st.sampled_from([1.0, 5.0, 1e9]),
        priority=st.integers(0, 1),
        family=st.sampled_from([None, 0, 0, 1]),
        fetches=st.sampled_from([False, False, True]),
    )
    def enter(self, tokens: int, patience_s: float, priority: int, family: int | None, fetches: bool) -> None:
        job = a_job(tokens, self.now_s + patience_s, self.count, priority, family)
        queued = sum(j.tokens for j in self.waiting)
        if tokens // BLOCK > self.pools.blocks.count:
            with pytest.raises(InvalidRequestError, match=f"{tokens} tokens needs {tokens // BLOCK} KV blocks"):
                self.scheduler.enter(job)
        elif len(self.waiting) >= 5:
            with pytest.raises(OverloadedError, match="5 requests wait, the limit is 5"):
                self.scheduler.enter(job)
        elif self.waiting and queued + tokens > 800:
            with pytest.raises(OverloadedError, match=f"{queued} tokens wait and {tokens} came, the limit is 800"):
                self.scheduler.enter(job)
        else:
            self.scheduler.enter(job)
            self.waiting.append(job)
            self.count += 1
            if not fetches:
                self._submit(job)

    @rule(data=st.data())
    def what_was_fetched_is_there(self, data: st.DataObject) -> None:
        coming = [job for job in self.waiting if not job.may_start]
        if coming:
            self._submit(data.draw(st.sampled_from(coming)))

    def _submit(self, job: Job[int]) -> None:
        if self.now_s < job.deadline_s:
            self.scheduler.submit(job, self.now_s)
        else:
            with pytest.raises(DeadlineError):
                self.scheduler.submit(job, self.now_s)
            self._forget(job)

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def step(self) -> None:
        room, before = {job.payload: self._has_room(job) for job in self.waiting}, list(self.started)
        step = self.scheduler.next_step(self.now_s)
        for job in step.late:
            assert self.now_s >= job.deadline_s
            self._forget(job)
        here = sorted((*self.started, *(job for job in self.waiting if job.may_start)), key=rank)
        assert all(self.now_s < job.deadline_s for job in here)
        for chunk in step.chunks:
            if chunk.job in self.waiting:
                assert chunk.job.may_start, "its blocks may still come"
                self.waiting.remove(chunk.job)
                self.started.append(chunk.job)
                self._check(chunk.job)
        assert sum(chunk.tokens for chunk in step.chunks) <= self.step_tokens
        if here:
            assert sum(chunk.tokens for chunk in step.chunks if chunk.job is here[0]) or not room[here[0].payload]
            self._check_head(here[0], step.chunks, before)
        self.scheduler.advance(step.chunks, 1e-6, self.now_s)
        for chunk in step.chunks:
            publish(self.index, chunk.job)
            if chunk.job.computed == chunk.job.tokens:
                self.started.remove(chunk.job)
                self.leased.append(chunk.job)
                assert not self.scheduler.remove(chunk.job), "it is not here any more"

    def _check_head(self, head: Job[int], chunks: list[Chunk[int]], before: list[Job[int]]) -> None:
        """Whoever is first advances by half a step at least, unless its slabs are not free; then nobody else starts."""
        of_head = sum(chunk.tokens for chunk in chunks if chunk.job is head)
        if of_head:
            assert of_head >= min(head.left, self.step_tokens / 2)
        else:
            assert all(chunk.job in before for chunk in chunks), "the first one was overtaken"

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        here = self.waiting + self.started
        if here:
            job = data.draw(st.sampled_from(here))
            assert self.scheduler.remove(job)
            assert not self.scheduler.remove(job)
            self._forget(job)

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def find_a_reused_block_broken(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.started))
        if job.run:
            self.index.discard(data.draw(st.sampled_from(job.run)))
            self.scheduler.restart(job)
            assert (job.left, list(job.slabs), job.run) == (job.tokens, [], [])
            self.started.remove(job)
            self.waiting.append(job)

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
            jobs = self.started + self.leased
            held = {(slab, _content(job, kind, i)) for job in jobs for i, slab in enumerate(job.slabs.of(kind))}
            assert len({slab for slab, _ in held}) == len(held), f"a slab of {kind.name} was given out twice"
            assert self.pools.available(kind) + len(held) == allocator.count
        slots = [job.slot for job in self.started]
        assert len(set(slots)) == len(slots)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for job in [job for job in self.waiting if not job.may_start]:
            self._submit(job)
        while self.waiting or self.started or self.leased:
            for job in self.leased:
                self.pools.give_back(job.slabs)
            self.leased.clear()
            left = [job.left for job in (*self.waiting, *self.started)]
            self.step()
            assert sum(left) > sum(job.left for job in (*self.waiting, *self.started)) or not left, "nobody advances"
        for kind, allocator in zip(KINDS, (self.pools.blocks, self.pools.tails, self.pools.sinks), strict=True):
            assert self.pools.available(kind) == allocator.count
        assert self.scheduler.slots.free == self.scheduler.slots.count
        self.index.make_room({SlabKind.BLOCK: self.pools.blocks.count})
        assert len(self.index) == 0

    def _forget(self, job: Job[int]) -> None:
        assert (job in self.waiting) != (job in self.started)
        (self.waiting if job in self.waiting else self.started).remove(job)
        self.pools.give_back(job.slabs)

    def _check(self, job: Job[int]) -> None:
        assert [len(job.slabs.of(kind)) for kind in KINDS] == self._needs(job.tokens)
        assert job.reused_blocks <= max(0, job.tokens - 1) // BLOCK, "no token is left to be computed"
        reused = {slab for block in job.run for slab in block.slabs}
        names = [(slab[0], generation) for slab, generation in job.generations.items() if slab not in reused]
        assert self.seen_generations.isdisjoint(names), "a generation was given out twice"
        self.seen_generations.update(names)

    def _needs(self, tokens: int) -> list[int]:
        """Slabs of each of KINDS."""
        full, rest = divmod(tokens, BLOCK)
        return [full, 1 if rest else 0, 1 if full and self.has_sinks else 0]

    def _has_room(self, job: Job[int]) -> bool:
        slabs = self.index.hold(self.index.find(job.names[: job.reusable_blocks]))
        missing = self.pools.missing(slabs, job.tokens, tail_of=job.tokens)
        fits = self.pools.can_have(missing)
        self.pools.give_back(slabs)
        return fits and self.scheduler.slots.free > 0


def _content(job: Job[int], kind: SlabKind, i: int) -> object:
    """What the i-th slab of a kind holds: two jobs may only share what is the same."""
    return (i, job.names[i]) if kind is not SlabKind.TAIL and i < len(job.names) else (i, job.payload)


PrefillMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPrefillScheduler = PrefillMachine.TestCase


def a_scheduler(step_tokens: int = 256, blocks: int = 1000) -> PrefillScheduler[int]:
    return PrefillScheduler(
        PrefixIndex(pools_of("raw", blocks, 100, 1)),
        slots=32,
        step_tokens=step_tokens,
        queue_requests_max=100,
        queue_tokens_max=1 << 20,
    )


def submit(scheduler: PrefillScheduler[int], job: Job[int], now_s: float) -> None:
    """Of a job that waits for nobody's blocks."""
    scheduler.enter(job)
    scheduler.submit(job, now_s)


def run_step(scheduler: PrefillScheduler[int], seconds: float = 0.0, now_s: float = 0.0) -> dict[int, int]:
    """Tokens by the payload of their job."""
    chunks = scheduler.next_step(now_s).chunks
    tokens = {chunk.job.payload: chunk.tokens for chunk in chunks}
    scheduler.advance(chunks, seconds, now_s + seconds)
    for chunk in chunks:
        publish(scheduler.index, chunk.job)
    return tokens


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.lists(st.integers(1, 128), max_size=300))
def test_nobody_starves_behind_short_prompts(lengths: list[int], shorts: list[int]) -> None:
    """However many short prompts keep coming, a job ends after the steps that it and those before it take at half."""
    scheduler = a_scheduler(blocks=10_000)
    jobs = [Job(tokens, 1e9, -1) for tokens in lengths]
    for job in jobs:
        submit(scheduler, job, 0.0)
    steps = 0
    while jobs[-1].left:
        if steps < len(shorts):
            submit(scheduler, Job(shorts[steps], 1e9, steps), 0.0)
        run_step(scheduler)
        steps += 1
    assert steps <= sum(-(-tokens // 128) for tokens in lengths)


def test_a_short_prompt_behind_a_long_one_takes_one_step() -> None:
    scheduler = a_scheduler()
    submit(scheduler, Job(4000, 1e9, 0), 0.0)
    assert run_step(scheduler) == {0: 256}
    submit(scheduler, Job(100, 1e9, 1), 0.0)
    assert run_step(scheduler) == {0: 156, 1: 100}
    assert run_step(scheduler) == {0: 256}


def test_a_higher_priority_goes_first() -> None:
    scheduler = a_scheduler()
    for payload, priority in enumerate((0, 0, 7)):
        submit(scheduler, Job(300, 1e9, payload, priority), 0.0)
    assert [run_step(scheduler) for _ in range(4)] == [{2: 256}, {2: 44, 0: 212}, {0: 88, 1: 168}, {1: 132}]


def test_work_that_would_certainly_come_too_late_is_refused() -> None:
    scheduler = a_scheduler()
    submit(scheduler, Job(256, 0.001, 0), 0.0)
    assert run_step(scheduler, seconds=0.5) == {0: 256}, "nothing is known yet: it is tried"
    # 512 tokens/s were measured; twice that would still be too slow
    with pytest.raises(
        DeadlineError, match=r"2048 tokens behind 0 others takes 2.00 s at least, its deadline is in 1.90 s"
    ):
        submit(scheduler, Job(2048, 2.5, 1), 0.6)
    submit(scheduler, Job(2048, 2.7, 2), 0.6)
    assert scheduler.next_step(0.6).late == []
    submit(scheduler, Job(2048, 33.0, 3), 31.0)  # what was measured so long ago says nothing


def test_what_is_computed_before_it_makes_a_prompt_late() -> None:
    scheduler = a_scheduler()
    submit(scheduler, Job(256, 1e9, 0), 0.0)
    assert run_step(scheduler, seconds=0.5) == {0: 256}  # 512 tokens/s
    submit(scheduler, Job(1024, 1e9, 1), 1.0)
    with pytest.raises(DeadlineError, match=r"1024 tokens behind 1024 others takes 2.00 s at least.* in 1.50 s"):
        submit(scheduler, Job(1024, 2.5, 2), 1.0)
    submit(scheduler, Job(1000, 2.5, 3), 1.0)  # shorter ones overtake
    submit(scheduler, Job(1024, 2.5, 4, 1), 1.0)  # as does a higher priority
    with pytest.raises(DeadlineError, match="behind 1024 others"):
        submit(scheduler, Job(100, 2.0, 5), 1.0)  # but not this one
    assert scheduler.queued_requests == 3


def test_who_waits_is_dropped_when_it_can_no_longer_be_in_time() -> None:
    scheduler = a_scheduler()
    submit(scheduler, Job(256, 1e9, 0), 0.0)
    assert run_step(scheduler, seconds=0.5) == {0: 256}
    first, second, third = Job(1024, 1e9, 1), Job(1024, 4.0, 2), Job(1024, 5.5, 3)
    for job in (first, second, third):
        submit(scheduler, job, 1.0)
    assert scheduler.next_step(1.0).late == []
    step = scheduler.next_step(2.5)
    assert step.late == [second], "2048 tokens in 1.5 s; without it the third has 2048 tokens in 3 s"
    assert {chunk.job for chunk in step.chunks} == {first}


def test_what_can_no_longer_be_in_time_is_dropped() -> None:
    scheduler = a_scheduler()
    job = Job(1024, 1.2, 0)
    submit(scheduler, job, 0.0)
    assert run_step(scheduler, seconds=0.5, now_s=0.0) == {0: 256}
    step = scheduler.next_step(0.5)
    assert (step.late, step.chunks) == ([job], []), "768 tokens in 0.7 s are more than twice 512 tokens/s"
    scheduler.pools.give_back(job.slabs)
    scheduler.check_integrity()


def test_the_same_prompt_is_computed_once() -> None:
    scheduler = a_scheduler(step_tokens=4 * BLOCK)
    jobs = [a_job(6 * BLOCK + 10, 1e9, payload, family=0) for payload in range(3)]
    for job in jobs:
        submit(scheduler, job, 0.0)
    assert run_step(scheduler) == {0: 4 * BLOCK}, "the others wait for the first one"
    assert run_step(scheduler) == {0: 2 * BLOCK + 10}, "which is not yet behind the last block that they share"
    assert run_step(scheduler) == {1: 10, 2: 10}
    assert [job.reused_blocks for job in jobs] == [0, 6, 6]
    assert jobs[0].slabs.blocks == jobs[1].slabs.blocks == jobs[2].slabs.blocks


def test_who_waits_for_a_block_goes_on_where_the_other_parts_from_it() -> None:
    scheduler = a_scheduler(step_tokens=2 * BLOCK)
    first, second = (a_job(8 * BLOCK, 1e9, payload, family=payload) for payload in range(2))
    second.names = [*first.names[:2], *second.names[2:]]
    for job in (first, second):
        submit(scheduler, job, 0.0)
    assert run_step(scheduler) == {0: 2 * BLOCK}
    assert run_step(scheduler) == {0: 2 * BLOCK}, (
        "the first in line goes first, but nothing hinders the second any more"
    )
    scheduler.remove(first)
    scheduler.pools.give_back(first.slabs)
    assert run_step(scheduler) == {1: 2 * BLOCK}
    assert second.reused_blocks == 2


def test_when_the_one_that_was_waited_for_goes_away_another_computes() -> None:
    scheduler = a_scheduler(step_tokens=2 * BLOCK)
    first, second = (a_job(8 * BLOCK, 1e9, payload, family=0) for payload in range(2))
    for job in (first, second):
        submit(scheduler, job, 0.0)
    assert run_step(scheduler) == {0: 2 * BLOCK}
    scheduler.remove(first)
    scheduler.pools.give_back(first.slabs)
    assert run_step(scheduler) == {1: 2 * BLOCK}
    assert (second.reused_blocks, second.computed) == (2, 4 * BLOCK)


def test_a_higher_priority_does_not_wait_for_a_lower_one() -> None:
    scheduler = a_scheduler(step_tokens=2 * BLOCK)
    submit(scheduler, a_job(8 * BLOCK, 1e9, 0, family=0), 0.0)
    assert run_step(scheduler) == {0: 2 * BLOCK}
    submit(scheduler, a_job(8 * BLOCK, 1e9, 1, priority=1, family=0), 0.0)
    assert run_step(scheduler) == {1: 2 * BLOCK}


def test_what_is_there_does_not_make_a_prompt_late() -> None:
    scheduler = a_scheduler()
    submit(scheduler, a_job(1024, 1e9, 0, family=0), 0.0)
    for step in range(4):
        run_step(scheduler, seconds=0.5, now_s=0.5 * step)
    with pytest.raises(DeadlineError):
        submit(scheduler, a_job(1024, 2.5, 1, family=1), 2.0)
    submit(scheduler, a_job(1024, 2.5, 2, family=0), 2.0)
    assert run_step(scheduler, now_s=2.0) == {2: BLOCK}


@pytest.mark.parametrize("field", ["queued_tokens", "_started"])
def test_integrity_check_can_fail(field: str) -> None:
    scheduler = a_scheduler()
    setattr(scheduler, field, 1 if field == "queued_tokens" else [Job(1, 1.0, 0)])
    with pytest.raises(AssertionError, match=r"queued_tokens|have been started"):
        scheduler.check_integrity()
