"""Which tokens of which prompts are computed next, and in which slabs. Pure: no clock, no device, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from zipserve.common.chunking import rank, share
from zipserve.common.errors import DeadlineError, InvalidRequestError, OverloadedError
from zipserve.common.kv.allocator import SlabAllocator
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.pools import Slabs
from zipserve.common.kv.prefix_index import CachedBlock, PrefixIndex
from zipserve.prefill.throughput import Throughput

T = TypeVar("T")


@dataclass(eq=False)
class Job(Generic[T]):
    """A prompt that waits or is being computed, chunk after chunk."""

    tokens: int
    deadline_s: float
    """Time on the caller's clock after which nobody wants the result."""
    payload: T
    priority: int = 0
    """Higher goes first; first come, first served within."""
    names: Sequence[bytes] = ()
    """Chained hashes of its full blocks; empty where none is to be found by others."""
    reusable_blocks: int = 0
    """How many of them it may take from the index; not all of its tokens: the last one has to be computed."""
    number: int = field(default=-1, init=False)
    """Of its arrival."""
    may_start: bool = field(default=False, init=False)
    """Not yet, as long as blocks that others hold may come."""
    computed: int = field(default=0, init=False)
    """Tokens that are done, those that it found in the index included."""
    run: list[CachedBlock] = field(default_factory=list, init=False)
    """Its first blocks, as far as they are those of the index."""
    reused_blocks: int = field(default=0, init=False)
    """How many of them were there when it was started."""
    slot: int = field(default=-1, init=False)
    """-1 while it waits."""
    slabs: Slabs = field(default_factory=Slabs, init=False)
    """All that it will fill, from its first step on; they outlive the computation, with their lease."""
    generations: dict[tuple[SlabKind, int], int] = field(default_factory=dict, init=False)
    """Of the slabs."""

    @property
    def left(self) -> int:
        """Tokens that are still to be computed."""
        return self.tokens - self.computed


@dataclass(frozen=True)
class Chunk(Generic[T]):
    """The next `tokens` tokens of a job."""

    job: Job[T]
    tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with it."""
        return self.tokens == self.job.left


@dataclass
class Step(Generic[T]):
    """What to compute next, and the jobs that were given up because they would come too late."""

    chunks: list[Chunk[T]] = field(default_factory=list)
    late: list[Job[T]] = field(default_factory=list)
    """Those that had been started still hold their slabs, which are to be freed."""


class PrefillScheduler(Generic[T]):
    """Shares every step out among the prompts (`zipserve.common.chunking`), by priority, then by arrival.

    A prompt takes its slot and all its slabs at its first step: those of the blocks that the index has, and its own for
    the rest, for which the index makes room. When there is none for the first in line, nobody else starts either, until
    leases end. A prompt does not start while one before it computes the block that it needs next.
    """

    def __init__(
        self,
        index: PrefixIndex,
        *,
        slots: int,
        step_tokens: int,
        queue_requests_max: int,
        queue_tokens_max: int,
    ) -> None:
        self.index = index
        self.pools = index.pools
        self.slots = SlabAllocator(slots, "slots")
        self._step_tokens = step_tokens
        self._queue_requests_max = queue_requests_max
        self._queue_tokens_max = queue_tokens_max
        self._waiting: list[Job[T]] = []
        self._started: list[Job[T]] = []
        self._throughput = Throughput(step_tokens)
        self._arrivals = 0
        self.queued_tokens = 0
        """Tokens of all waiting jobs."""

    @property
    def queued_requests(self) -> int:
        """Waiting jobs."""
        return len(self._waiting)

    @property
    def running_requests(self) -> int:
        """Jobs that have been started."""
        return len(self._started)

    def tokens_per_s(self, now_s: float) -> float:
        """How fast prompts are computed; 0 while that is not known."""
        return self._throughput.tokens_per_s(now_s)

    def enter(self, job: Job[T]) -> None:
        """Gives a job a place in the queue; it is not started before `submit`.

        Raises:
            InvalidRequestError: it could never be computed here.
            OverloadedError: the queue is full.
        """
        needed, there_are = self.pools.sealed_blocks(job.tokens), self.pools.blocks.count
        if needed > there_are:
            raise InvalidRequestError(
                f"a prompt of {job.tokens} tokens needs {needed} KV blocks, this worker has {there_are}",
                field="token_ids",
            )
        if len(self._waiting) >= self._queue_requests_max:
            raise OverloadedError(f"{len(self._waiting)} requests wait, the limit is {self._queue_requests_max}")
        if self._waiting and self.queued_tokens + job.tokens > self._queue_tokens_max:
            raise OverloadedError(
                f"{self.queued_tokens} tokens wait and {job.tokens} came, the limit is {self._queue_tokens_max}"
            )
        self._arrivals += 1
        job.number = self._arrivals
        self._wait(job)

    def submit(self, job: Job[T], now_s: float) -> None:
        """Lets a job start that has a place in the queue.

        Raises:
            DeadlineError: it would certainly come too late, with what is to be computed before it; it has left the
                queue.
        """
        if self._is_late(job, now_s, sum(other.left for other in self._ready() if other is not job)):
            self.remove(job)
            ahead = self._ahead_of(job)
            takes_s = self._throughput.seconds_at_least(ahead + self._to_compute(job), now_s)
            raise DeadlineError(
                f"a prompt of {job.tokens} tokens behind {ahead} others takes {takes_s:.2f} s at least, "
                f"its deadline is in {max(0.0, job.deadline_s - now_s):.2f} s"
            )
        job.may_start = True

    def remove(self, job: Job[T]) -> bool:
        """Takes a job out that waits or is between two steps; False when it is not here (any more).

        Its slot is free then, its slabs are to be freed by the caller.
        """
        if job in self._waiting:
            self._waiting.remove(job)
            self.queued_tokens -= job.tokens
        elif job in self._started:
            self._stop(job)
        else:
            return False
        return True

    def restart(self, job: Job[T]) -> None:
        """Sends a job that was started back to the queue, without its slabs: it starts anew from what is sound."""
        self._stop(job)
        self.pools.give_back(job.slabs)
        job.computed, job.reused_blocks = 0, 0
        job.run.clear()
        self._wait(job)

    def next_step(self, now_s: float) -> Step[T]:
        """Plans the next step; it has no chunks when there is nothing to compute, or no slabs to compute it in."""
        jobs = sorted(self._ready(), key=rank)
        late = self._remove_late(jobs, now_s)
        jobs = [job for job in jobs if job not in late]
        may_start = not jobs or self._try_start(jobs[0])
        shares = share(jobs, self._step_tokens, lambda job: job.slot >= 0 or (may_start and self._try_start(job)))
        return Step([Chunk(job, tokens) for job, tokens in shares.items()], late)

    def advance(self, chunks: list[Chunk[T]], seconds: float, now_s: float) -> None:
        """Counts the chunks of a step that took so long; jobs that are complete leave, and keep their slabs only."""
        self._throughput.note(sum(chunk.tokens for chunk in chunks), seconds, now_s)
        for chunk in chunks:
            chunk.job.computed += chunk.tokens
            if not chunk.job.left:
                self._stop(chunk.job)

    def _ready(self) -> list[Job[T]]:
        """Jobs that have been started or may be."""
        return [*self._started, *(job for job in self._waiting if job.may_start)]

    def _remove_late(self, jobs: Sequence[Job[T]], now_s: float) -> list[Job[T]]:
        """Takes those out, of jobs in order of rank, that can not be computed in time any more."""
        late, ahead_at_most = [], 0
        for job in jobs:
            if self._is_late(job, now_s, ahead_at_most):
                self.remove(job)
                late.append(job)
            else:
                ahead_at_most += job.left
        return late

    def _is_late(self, job: Job[T], now_s: float, ahead_at_most: int) -> bool:
        def comes_late(tokens: int) -> bool:
            return now_s + self._throughput.seconds_at_least(tokens, now_s) >= job.deadline_s

        # The exact number costs look-ups, and is asked for only where it may matter.
        return comes_late(ahead_at_most + job.left) and comes_late(self._ahead_of(job) + self._to_compute(job))

    def _ahead_of(self, job: Job[T]) -> int:
        """Tokens that are certainly computed before those of a job: of a higher priority, or of prompts that came
        before it and are not longer, see `share`."""
        return sum(
            self._to_compute(other)
            for other in self._ready()
            if other.priority > job.priority or (rank(other) < rank(job) and other.left <= job.left)
        )

    def _to_compute(self, job: Job[T]) -> int:
        """Tokens of a job that are to be computed for it alone."""
        if job.slot >= 0:
            return job.left
        found = len(self.index.find(job.names[: job.reusable_blocks]))
        while found < job.reusable_blocks and any(self._computes(other, job, found) for other in self._started):
            found += 1
        return job.left - found * self.pools.block_tokens

    def _try_start(self, job: Job[T]) -> bool:
        """Whether a job has, or now gets, its slot and slabs."""
        if job.slot >= 0:
            return True
        run = self.index.find(job.names[: job.reusable_blocks])
        if not self.slots.free or self._is_ahead(job, len(run)):
            return False
        slabs = self.index.hold(run)
        missing = self.pools.missing(slabs, job.tokens, tail_of=job.tokens)
        if not self.pools.can_have(missing):
            self.pools.give_back(slabs)
            return False
        self.index.note_request(job.names)
        self.pools.try_extend(slabs, job.tokens, tail_of=job.tokens)
        self.remove(job)
        job.run, job.reused_blocks, job.computed = run, len(run), len(run) * self.pools.block_tokens
        job.slabs, job.slot = slabs, self.slots.take(1)[0]
        job.generations = {slab: self.pools.generation(*slab) for slab in slabs}
        self._started.append(job)
        return True

    def _is_ahead(self, job: Job[T], block: int) -> bool:
        """Whether somebody before a job computes the block that it needs next: then it is computed once."""
        if block >= job.reusable_blocks:
            return False
        return any(rank(other) < rank(job) and self._computes(other, job, block) for other in self._started)

    def _computes(self, other: Job[T], job: Job[T], block: int) -> bool:
        """Whether another job, which has been started, will compute a block of this one and put it into the index."""
        if block >= len(other.names) or other.names[block] != job.names[block]:
            return False
        return len(other.run) == self.pools.sealed_blocks(other.computed) <= block

    def _wait(self, job: Job[T]) -> None:
        self._waiting.append(job)
        self.queued_tokens += job.tokens

    def _stop(self, job: Job[T]) -> None:
        self._started.remove(job)
        self.slots.give_back([job.slot])
        job.slot = -1

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        self.pools.check_integrity()
        self.index.check_integrity()
        self.slots.check_integrity()
        if self.queued_tokens != sum(job.tokens for job in self._waiting):
            raise AssertionError("queued_tokens does not match the queue")
        if self.slots.count - self.slots.free != len(self._started):
            raise AssertionError(f"{len(self._started)} jobs have been started, {self.slots.free} slots are free")
