"""Which sequences hold slabs, and which wait for them. Pure: no clock, no device, no I/O."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.kv.allocator import SlabAllocator


@dataclass(frozen=True)
class Reservation:
    """Everything that a sequence needs until its last token, so that it never has to stop halfway."""

    blocks: list[int]
    tails: list[int]
    """One slab if the pulled KV ends with a tail, else none. Only needed until the tail is unpacked."""
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
        *,
        blocks: int,
        tails: int,
        slots: int,
        block_tokens: int,
        queue_requests_max: int,
        queue_tokens_max: int,
    ) -> None:
        self.blocks = SlabAllocator(blocks)
        self.tails = SlabAllocator(tails, "tail slabs")
        self.slots = SlabAllocator(slots, "slots")
        self._block_tokens = block_tokens
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
        needed = ticket.total_tokens // self._block_tokens
        if needed > self.blocks.count:
            raise InvalidRequestError(
                f"a sequence of {ticket.total_tokens} tokens needs {needed} KV blocks, "
                f"this worker has {self.blocks.count}",
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
        if reservation.tails:
            self.tails.give_back(reservation.tails)
            reservation.tails.clear()
            self._admit()

    def free(self, reservation: Reservation) -> None:
        """Frees all of a reservation."""
        self.free_tail(reservation)
        self.blocks.give_back(reservation.blocks)
        self.slots.give_back([reservation.slot])
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            ticket = self._queue[0]
            needed = ticket.total_tokens // self._block_tokens
            tails = 1 if ticket.pulled_tokens % self._block_tokens else 0
            if needed > self.blocks.free or tails > self.tails.free or not self.slots.free:
                return
            self._queue.popleft()
            self.queued_tokens -= ticket.total_tokens
            reservation = Reservation(self.blocks.take(needed), self.tails.take(tails), self.slots.take(1)[0])
            ticket.on_reserved(reservation)

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        for allocator in (self.blocks, self.tails, self.slots):
            allocator.check_integrity()
        if self.queued_tokens != sum(ticket.total_tokens for ticket in self._queue):
            raise AssertionError("queued_tokens does not match the queue")
