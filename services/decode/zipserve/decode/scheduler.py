"""Which sequences hold slabs, and which wait for them. Pure: no clock, no device, no I/O."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.kv.allocator import SlabAllocator
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.pools import SlabPools, Slabs
from zipserve.common.kv.prefix_index import CachedBlock, PrefixIndex

T = TypeVar("T")


class Place(Enum):
    """Where a sequence is."""

    OUTSIDE = auto()
    """Not yet submitted, or gone."""
    WAITING = auto()
    ADMITTED = auto()
    """Holds its slabs and slot; its KV is being read into them."""
    RUNNING = auto()
    PARKED = auto()
    """Was running; holds nothing now, and waits again."""


@dataclass(eq=False)
class Ticket(Generic[T]):
    """A sequence's place, and what it holds."""

    tokens: int
    """Those that it must have room for: the ones it comes with, then always one more than it has."""
    total_tokens: int
    """All that it may ever have."""
    payload: T
    on_admitted: Callable[["Ticket[T]"], None]
    """Called when it gets its slabs and slot, at first and after it was parked."""
    priority: int = 0
    """Higher goes first; first come, first served within."""
    names: Sequence[bytes] = ()
    """Of its first blocks, those that it may have from the index."""
    tail_of: int = 0
    """Its length at the handoff; 0 when it comes without a tail slab to read."""
    forks: int = 0
    """Sequences that will go on from the same tokens; it is admitted together with slots for them."""
    may_start: bool = field(default=False, init=False)
    """Not yet, as long as blocks that others hold may come."""
    number: int = field(default=-1, init=False)
    place: Place = field(default=Place.OUTSIDE, init=False)
    slabs: Slabs = field(default_factory=Slabs, init=False)
    run: list[CachedBlock] = field(default_factory=list, init=False)
    """Its first blocks, as far as they are those of the index; when it is admitted, those that were there."""
    slot: int = field(default=-1, init=False)
    fork_slots: list[int] = field(default_factory=list, init=False)
    """Of the forks that have not come yet."""


def _rank(ticket: Ticket[T]) -> tuple[int, int]:
    return -ticket.priority, ticket.number


class DecodeScheduler(Generic[T]):
    """Gives sequences slabs as they grow, by priority, then by arrival.

    Who is admitted gets the slabs for the tokens that it comes with, of blocks that are in the index the same, when as
    many are left that everybody can grow by a block. When they run out all the same, the last in rank is parked. Parked
    and waiting sequences stand in one line, whose first is never overtaken. The first in rank of the running ones is
    never parked: it can always finish.

    Args:
        parked_bytes: host memory of a parked sequence of so many tokens.
    """

    def __init__(
        self,
        index: PrefixIndex,
        *,
        slots: int,
        queue_requests_max: int,
        queue_tokens_max: int,
        parked_bytes_max: int,
        parked_bytes: Callable[[int], int],
    ) -> None:
        self.index = index
        self.pools = index.pools
        self.slots = SlabAllocator(slots, "slots")
        self._queue_requests_max = queue_requests_max
        self._queue_tokens_max = queue_tokens_max
        self._parked_bytes_max = parked_bytes_max
        self._bytes_of = parked_bytes
        self._tickets: dict[Place, list[Ticket[T]]] = {place: [] for place in Place}
        self._arrivals = 0

    @property
    def queued_requests(self) -> int:
        """Sequences that wait and never ran."""
        return len(self._tickets[Place.WAITING])

    @property
    def queued_tokens(self) -> int:
        """Tokens of those, generated ones included."""
        return sum(ticket.total_tokens for ticket in self._tickets[Place.WAITING])

    @property
    def running_requests(self) -> int:
        """Sequences in the batch."""
        return len(self._tickets[Place.RUNNING])

    @property
    def parked_requests(self) -> int:
        """Sequences that had to make room."""
        return len(self._tickets[Place.PARKED])

    @property
    def parked_bytes(self) -> int:
        """Host memory of those."""
        return sum(self._bytes_of(ticket.tokens) for ticket in self._tickets[Place.PARKED])

    def enter(self, ticket: Ticket[T]) -> None:
        """Gives a sequence a place in the queue; it is not admitted before `submit`.

        Raises:
            InvalidRequestError: it could never be held here.
            OverloadedError: the queue is full, or it comes with more forks than there are slots.
        """
        needed = self.pools.sealed_blocks(ticket.total_tokens)
        if needed > self.pools.blocks.count:
            raise InvalidRequestError(
                f"a sequence of {ticket.total_tokens} tokens needs {needed} KV blocks, "
                f"this worker has {self.pools.blocks.count}",
                field="max_new_tokens",
            )
        if 1 + ticket.forks > self.slots.count:
            raise OverloadedError(  # each by itself has room
                f"{1 + ticket.forks} sequences of one prompt are more than the {self.slots.count} of this worker"
            )
        if self.queued_requests >= self._queue_requests_max:
            raise OverloadedError(f"{self.queued_requests} sequences wait, the limit is {self._queue_requests_max}")
        if self.queued_requests and self.queued_tokens + ticket.total_tokens > self._queue_tokens_max:
            raise OverloadedError(
                f"sequences of {self.queued_tokens} tokens wait and one of {ticket.total_tokens} came, "
                f"the limit is {self._queue_tokens_max}"
            )
        self._arrivals += 1
        ticket.number = self._arrivals
        self._arrivals += ticket.forks
        self._move(ticket, Place.WAITING)

    def submit(self, ticket: Ticket[T]) -> None:
        """Admits a sequence that has a place in the queue, now or later: calls `ticket.on_admitted`, perhaps before
        this returns.
        """
        ticket.may_start = True
        self._admit()

    def restart(self, ticket: Ticket[T]) -> None:
        """Sends an admitted sequence back to its place in the queue, without its slabs: it starts anew from what is
        sound."""
        self._free(ticket)
        self._move(ticket, Place.WAITING)
        self._admit()

    def fork(self, ticket: Ticket[T], forks: Sequence[Ticket[T]]) -> None:
        """Admits the forks of an admitted sequence: they share its slabs, and have slots of their own."""
        for i, fork in enumerate(forks, start=1):
            self.pools.share(ticket.slabs, fork.slabs)
            fork.run = list(ticket.run)
            fork.slot = ticket.fork_slots.pop()
            fork.number = ticket.number + i
            self._move(fork, Place.ADMITTED)

    def start(self, ticket: Ticket[T]) -> None:
        """An admitted sequence has its KV and joins the batch. Blocks that it shares may be what others wait for."""
        self._move(ticket, Place.RUNNING)
        self._admit()

    def leave(self, ticket: Ticket[T]) -> None:
        """Frees all that a sequence holds, wherever it is; nothing happens when it has left."""
        if ticket.place is not Place.OUTSIDE:
            self._free(ticket)
            self._move(ticket, Place.OUTSIDE)
            self._admit()

    def free_tail(self, ticket: Ticket[T]) -> None:
        """Frees the tail slab of a sequence, after it was unpacked; once only counts."""
        if self.pools.give_back_tail(ticket.slabs):
            self._admit()

    def give_back(self, slabs: Slabs) -> None:
        """Takes slabs back that somebody else held."""
        self.pools.give_back(slabs)
        self._admit()

    def victim(self) -> Ticket[T] | None:
        """Who must be parked, or leave, so that the others can grow; None when they can."""
        running = self._tickets[Place.RUNNING]
        kinds = (SlabKind.BLOCK, SlabKind.SINKS)
        missing = [self.pools.missing(ticket.slabs, ticket.tokens) for ticket in running]
        if len(running) < 2 or all(sum(m[kind] for m in missing) <= self.pools.available(kind) for kind in kinds):
            return None
        return max(running, key=_rank)

    def may_park(self, ticket: Ticket[T]) -> bool:
        """Whether there is host memory for a sequence."""
        return self.parked_bytes + self._bytes_of(ticket.tokens) <= self._parked_bytes_max

    def park(self, ticket: Ticket[T]) -> None:
        """Takes slabs and slot of a running sequence, whose KV was copied out; it stands in line for them again."""
        self._free(ticket)
        ticket.tail_of = ticket.forks = 0  # it brings its tail along, and the others go on by themselves
        self._move(ticket, Place.PARKED)

    def grow(self) -> list[Ticket[T]]:
        """Gives all running sequences what their next step needs, and returns them; to be called without a `victim`.

        The only one that runs may be missing: when its slabs are held by sequences that are not running yet.
        """
        ready = [t for t in self._tickets[Place.RUNNING] if self.pools.try_extend(t.slabs, t.tokens)]
        self._admit()
        return ready

    def _admit(self) -> None:
        while line := [*self._tickets[Place.PARKED], *(t for t in self._tickets[Place.WAITING] if t.may_start)]:
            ticket = min(line, key=_rank)
            if not self._try_hold(ticket):
                return
            self._move(ticket, Place.RUNNING if ticket.place is Place.PARKED else Place.ADMITTED)
            ticket.on_admitted(ticket)

    def _try_hold(self, ticket: Ticket[T]) -> bool:
        blocks = self.pools.sealed_blocks
        holders = [*self._tickets[Place.ADMITTED], *self._tickets[Place.RUNNING]]
        reserve = sum(
            (1 + len(holder.fork_slots)) * (len(holder.slabs.blocks) < blocks(holder.total_tokens))
            for holder in holders
        )
        reserve += (1 + ticket.forks) * (blocks(ticket.tokens) < blocks(ticket.total_tokens))
        if self.slots.free < 1 + ticket.forks:
            return False
        # Who was parked brings all of its KV along, and what was its own may be somebody else's by now.
        ticket.run = [] if ticket.place is Place.PARKED else self.index.find(ticket.names)
        held = self.index.hold(ticket.run)
        new_blocks = blocks(ticket.tokens) - len(ticket.run)
        # Alone on the worker it is admitted all the same: forks that cannot grow together take turns.
        has_room = not holders or new_blocks + reserve <= self.pools.available(SlabKind.BLOCK)
        if not has_room or not self.pools.try_extend(held, ticket.tokens, ticket.tail_of):
            self.pools.give_back(held)
            return False
        self.index.note_request(ticket.names)
        for kind in SlabKind:
            ticket.slabs.of(kind).extend(held.of(kind))
        ticket.slot, *ticket.fork_slots = self.slots.take(1 + ticket.forks)
        return True

    def _free(self, ticket: Ticket[T]) -> None:
        self.pools.give_back(ticket.slabs)
        ticket.run = []
        if ticket.slot >= 0:
            self.slots.give_back([ticket.slot, *ticket.fork_slots])
            ticket.slot = -1
            ticket.fork_slots = []

    def _move(self, ticket: Ticket[T], place: Place) -> None:
        if ticket.place is not Place.OUTSIDE:
            self._tickets[ticket.place].remove(ticket)
        if place is not Place.OUTSIDE:
            self._tickets[place].append(ticket)
        ticket.place = place

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        self.index.check_integrity()
        self.pools.check_integrity()
        self.slots.check_integrity()
        holders = self._tickets[Place.ADMITTED] + self._tickets[Place.RUNNING]
        held = sum(1 + len(holder.fork_slots) for holder in holders)
        if self.slots.count - self.slots.free != held:
            raise AssertionError(f"sequences hold {held} slots, {self.slots.free} are free")
        _check_held(holders, self.pools)


def _check_held(holders: Iterable[Ticket[T]], pools: SlabPools) -> None:
    """Asserts that every slab is held at least as often as there are sequences that have it: the index and leases may
    hold it too."""
    held = Counter(slab for ticket in holders for slab in ticket.slabs)
    for kind, allocator in (
        (SlabKind.BLOCK, pools.blocks),
        (SlabKind.TAIL, pools.tails),
        (SlabKind.SINKS, pools.sinks),
    ):
        for slab in range(allocator.count):
            if allocator.holders(slab) < held[kind, slab]:
                raise AssertionError(f"{kind.name} slab {slab} is not held by the {held[kind, slab]} that have it")
