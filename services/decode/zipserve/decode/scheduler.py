"""Which sequences hold slabs, and which wait for them. Pure: no clock, no device, no I/O."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.kv.allocator import SlabAllocator
from zipserve.common.kv.pools import SlabPools, Slabs


@dataclass(frozen=True)
class Reservation:
    """Everything that a sequence needs until its last token, so that it never has to stop halfway."""

    slabs: Slabs
    """Those of all tokens to come among them; the tail is only needed until it is unpacked."""
    slot: int


@dataclass(eq=False)
class Ticket:
    """A place in the queue."""

    pulled_tokens: int
    total_tokens: int
    """Pulled and generated tokens together, at most."""
    on_reserved: Callable[[Reservation], None]


class DecodeScheduler:
    """Reserves slabs in order of arrival; the head of the queue is never overtaken."""

    def __init__(
        self,
        pools: SlabPools,
        *,
        slots: int,
        queue_requests_max: int,
        queue_tokens_max: int,
    ) -> None:
        self.pools = pools
        self.slots = SlabAllocator(slots, "slots")
        self._queue_requests_max = queue_requests_max
        self._queue_tokens_max = queue_tokens_max
        self._queue: deque[Ticket] = deque()
        self.queued_tokens = 0
        """Tokens of all waiting sequences, generated ones included."""

    @property
    def queued_requests(self) -> int:
        """Waiting sequences."""
        return len(self._queue)

    def submit(self, ticket: Ticket) -> None:
        """Reserves for a sequence, now or later: calls `ticket.on_reserved`, perhaps before this returns.

        Raises:
            InvalidRequestError: it could never be held here.
            OverloadedError: the queue is full.
        """
        needed = self.pools.sealed_blocks(ticket.total_tokens)
        if needed > self.pools.blocks.count:
            raise InvalidRequestError(
                f"a sequence of {ticket.total_tokens} tokens needs {needed} KV blocks, "
                f"this worker has {self.pools.blocks.count}",
                field="max_new_tokens",
            )
        if len(self._queue) >= self._queue_requests_max:
            raise OverloadedError(f"{len(self._queue)} sequences wait, the limit is {self._queue_requests_max}")
        if self._queue and self.queued_tokens + ticket.total_tokens > self._queue_tokens_max:
            raise OverloadedError(
                f"sequences of {self.queued_tokens} tokens wait and one of {ticket.total_tokens} came, "
                f"the limit is {self._queue_tokens_max}"
            )
        self._queue.append(ticket)
        self.queued_tokens += ticket.total_tokens
        self._admit()

    def cancel(self, ticket: Ticket) -> None:
        """Takes a sequence out of the queue; nothing happens when it is not waiting there (any more)."""
        if ticket in self._queue:
            self._queue.remove(ticket)
            self.queued_tokens -= ticket.total_tokens
            self._admit()

    def free_tail(self, reservation: Reservation) -> None:
        """Frees the tail slab of a reservation, after it was unpacked or in the end; once only counts."""
        if self.pools.give_back_tail(reservation.slabs):
            self._admit()

    def free(self, reservation: Reservation) -> None:
        """Frees all of a reservation."""
        self.pools.give_back(reservation.slabs)
        self.slots.give_back([reservation.slot])
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            ticket = self._queue[0]
            slabs = self.pools.try_take(ticket.total_tokens, tail_of=ticket.pulled_tokens) if self.slots.free else None
            if slabs is None:
                return
            self._queue.popleft()
            self.queued_tokens -= ticket.total_tokens
            ticket.on_reserved(Reservation(slabs, self.slots.take(1)[0]))

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        self.pools.check_integrity()
        self.slots.check_integrity()
        if self.queued_tokens != sum(ticket.total_tokens for ticket in self._queue):
            raise AssertionError("queued_tokens does not match the queue")
