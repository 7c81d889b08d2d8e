"""Which prompts are computed together, and in which slabs. Pure: no clock, no device, no I/O."""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.kv.allocator import SlabAllocator
from zipserve.common.kv.pools import SlabPools, Slabs

T = TypeVar("T")


@dataclass(eq=False)
class Job(Generic[T]):
    """A prompt that waits or is being computed."""

    tokens: int
    deadline_s: float
    """Time on the caller's clock after which nobody wants the result."""
    payload: T


@dataclass
class Planned(Generic[T]):
    """A job with the slabs that it will fill. The slot is freed after the computation, the slabs with their lease."""

    job: Job[T]
    slabs: Slabs
    slot: int
    generations: list[int]
    """Of the slabs, in their order."""


@dataclass
class Batch(Generic[T]):
    """What to compute next, and the jobs that were given up because their deadline has passed."""

    planned: list[Planned[T]] = field(default_factory=list)
    expired: list[Job[T]] = field(default_factory=list)


class PrefillScheduler(Generic[T]):
    """First come, first served. Prompts are batched up to the token limit; one that is longer is computed alone.

    The head of the queue is never overtaken: when its slabs are not free, everyone waits for the leases to end.
    """

    def __init__(
        self,
        pools: SlabPools,
        *,
        slots: int,
        batch_tokens_max: int,
        queue_requests_max: int,
        queue_tokens_max: int,
    ) -> None:
        self.pools = pools
        self._slots = SlabAllocator(slots, "slots")
        self._batch_tokens_max = batch_tokens_max
        self._queue_requests_max = queue_requests_max
        self._queue_tokens_max = queue_tokens_max
        self._queue: deque[Job[T]] = deque()
        self.queued_tokens = 0
        """Tokens of all waiting jobs."""

    @property
    def queued_requests(self) -> int:
        """Waiting jobs."""
        return len(self._queue)

    def submit(self, job: Job[T]) -> None:
        """Appends a job to the queue.

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
        if len(self._queue) >= self._queue_requests_max:
            raise OverloadedError(f"{len(self._queue)} requests wait, the limit is {self._queue_requests_max}")
        if self._queue and self.queued_tokens + job.tokens > self._queue_tokens_max:
            raise OverloadedError(
                f"{self.queued_tokens} tokens wait and {job.tokens} came, the limit is {self._queue_tokens_max}"
            )
        self._queue.append(job)
        self.queued_tokens += job.tokens

    def cancel(self, job: Job[T]) -> bool:
        """Takes a job out of the queue; False when it is not waiting there (any more)."""
        if job not in self._queue:
            return False
        self._queue.remove(job)
        self.queued_tokens -= job.tokens
        return True

    def next_batch(self, now_s: float) -> Batch[T]:
        """Takes the next jobs out of the queue; nothing is planned when the head's slabs are not free."""
        batch: Batch[T] = Batch()
        tokens = 0
        while self._queue:
            job = self._queue[0]
            if now_s >= job.deadline_s:
                batch.expired.append(job)
            elif batch.planned and tokens + job.tokens > self._batch_tokens_max:
                break
            else:
                planned = self._plan(job)
                if planned is None:
                    break
                batch.planned.append(planned)
                tokens += job.tokens
            self._queue.popleft()
            self.queued_tokens -= job.tokens
        return batch

    def free_slot(self, slot: int) -> None:
        """Frees the slot of a computed job."""
        self._slots.give_back([slot])

    def _plan(self, job: Job[T]) -> Planned[T] | None:
        slabs = self.pools.try_take(job.tokens, tail_of=job.tokens) if self._slots.free else None
        if slabs is None:
            return None
        return Planned(job, slabs, self._slots.take(1)[0], [self.pools.generation(*slab) for slab in slabs])

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        self.pools.check_integrity()
        self._slots.check_integrity()
        if self.queued_tokens != sum(job.tokens for job in self._queue):
            raise AssertionError("queued_tokens does not match the queue")
