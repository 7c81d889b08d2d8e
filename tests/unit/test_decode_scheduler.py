"""DecodeScheduler under any order of calls: nobody is overtaken, the first always goes on, everybody ends, no slab is
lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.decode.scheduler import DecodeScheduler, Place, Ticket
from zipserve.v1.kv_pb2 import BlockRef

BLOCK = 64
KINDS = (SlabKind.BLOCK, SlabKind.TAIL, SlabKind.SINKS)
QUEUE_REQUESTS_MAX, QUEUE_TOKENS_MAX = 4, 1200


def pools_of(codec: str, blocks: int, tails: int, sinks: int) -> SlabPools:
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", codec, BLOCK)
    return SlabPools(layout, blocks=blocks, tails=tails, sinks=sinks)


def rank(ticket: Ticket[int]) -> tuple[int, int]:
    return -ticket.priority, ticket.payload


def scheduler_of(pools: SlabPools, slots: int, parked_bytes_max: int = 1 << 30) -> DecodeScheduler[int]:
    """A parked token takes a byte."""
    return DecodeScheduler(
        PrefixIndex(pools),
        slots=slots,
        queue_requests_max=QUEUE_REQUESTS_MAX,
        queue_tokens_max=QUEUE_TOKENS_MAX,
        parked_bytes_max=parked_bytes_max,
        parked_bytes=lambda tokens: tokens,
    )


class DecodeMachine(RuleBasedStateMachine):
    """Sequences come, wait, find blocks or get their KV, let others find it, step together, are parked and brought
    back, and leave at any moment."""

    @initialize(
        codec=st.sampled_from(["raw", "zip-4/32"]),
        blocks=st.integers(1, 8),
        tails=st.integers(1, 3),
        sinks=st.integers(1, 3),
        slots=st.integers(1, 4),
        parked_bytes_max=st.sampled_from([0, 300, 1 << 30]),
    )
    def begin(self, codec: str, blocks: int, tails: int, sinks: int, slots: int, parked_bytes_max: int) -> None:
        self.has_sinks = codec != "raw"
        self.parked_bytes_max = parked_bytes_max
        self.pools = pools_of(codec, blocks, tails, sinks)
        self.scheduler = scheduler_of(self.pools, slots, parked_bytes_max)
        self.here: list[Ticket[int]] = []
        self.failed: list[Ticket[int]] = []
        self.count = 0
        self.counts = {kind: self.pools.free(kind) for kind in KINDS}

    def _at(self, *places: Place) -> list[Ticket[int]]:
        return [ticket for ticket in self.here if ticket.place in places]

    def _on_admitted(self, ticket: Ticket[int]) -> None:
        line = self._line()
        assert all(rank(ticket) < rank(other) for other in line if other is not ticket), "somebody was overtaken"
        assert self._missing(ticket) == [0, 0]
        was_handed_over = ticket.place is Place.ADMITTED and ticket.tail_of % BLOCK > 0
        assert len(ticket.slabs.tails) == was_handed_over

    def _line(self) -> list[Ticket[int]]:
        waiting = self._at(Place.WAITING)
        return [*self._at(Place.PARKED), *(ticket for ticket in waiting if ticket.may_start)]

    def _missing(self, ticket: Ticket[int]) -> list[int]:
        missing = self.pools.missing(ticket.slabs, ticket.tokens)
        return [missing[SlabKind.BLOCK], missing[SlabKind.SINKS]]

    @rule(
        pulled=st.integers(1, 320),
        new=st.integers(1, 320),
        priority=st.integers(0, 1),
        local=st.booleans(),
        forks=st.sampled_from([0, 0, 1, 3]),
        group=st.sampled_from([None, 0, 1]),
        fetches=st.sampled_from([False, False, True]),
    )
    def enter(
        self, pulled: int, new: int, priority: int, local: bool, forks: int, group: int | None, fetches: bool
    ) -> None:
        total = pulled + new
        tail_of = 0 if local else pulled
        ticket: Ticket[int] = Ticket(pulled, total, self.count, self._on_admitted, priority)
        ticket.tail_of, ticket.forks = tail_of, forks
        if group is not None:  # those of a group begin with the same tokens
            ticket.names = [bytes([group, block]) for block in range(pulled // BLOCK)]
        waiting = self._at(Place.WAITING)
        queued = sum(other.total_tokens for other in waiting)
        if total // BLOCK > self.pools.blocks.count:
            with pytest.raises(InvalidRequestError, match=f"{total} tokens needs {total // BLOCK} KV blocks"):
                self.scheduler.enter(ticket)
        elif 1 + forks > self.scheduler.slots.count:
            with pytest.raises(OverloadedError, match=f"{1 + forks} sequences of one prompt are more than the"):
                self.scheduler.enter(ticket)
        elif len(waiting) >= QUEUE_REQUESTS_MAX:
            with pytest.raises(OverloadedError, match="4 sequences wait, the limit is 4"):
                self.scheduler.enter(ticket)
        elif waiting and queued + total > QUEUE_TOKENS_MAX:
            with pytest.raises(OverloadedError, match=f"of {queued} tokens wait and one of {total} came, the limit is"):
                self.scheduler.enter(ticket)
        else:
            self.count += 1 + forks
            self.here.append(ticket)
            self.scheduler.enter(ticket)
            assert ticket.place is Place.WAITING
            if not fetches:
                self.scheduler.submit(ticket)

    @rule(data=st.data())
    def what_was_fetched_is_there(self, data: st.DataObject) -> None:
        coming = [ticket for ticket in self._at(Place.WAITING) if not ticket.may_start]
        if coming:
            self.scheduler.submit(data.draw(st.sampled_from(coming)))

    @rule(data=st.data())
    def has_found_a_broken_block(self, data: st.DataObject) -> None:
        admitted = [ticket for ticket in self._at(Place.ADMITTED) if ticket.run]
        if admitted:
            ticket = data.draw(st.sampled_from(admitted))
            self.scheduler.index.discard(data.draw(st.sampled_from(ticket.run)))
            self.scheduler.restart(ticket)

    @rule(data=st.data())
    def joins(self, data: st.DataObject) -> None:
        if admitted := self._at(Place.ADMITTED):
            self._start(data.draw(st.sampled_from(admitted)))

    def _publish(self, ticket: Ticket[int]) -> None:
        index = self.scheduler.index
        for block in range(len(ticket.run), len(ticket.names)):
            slabs = [(SlabKind.SINKS, slab) for slab in ticket.slabs.sinks if not block]
            slabs.append((SlabKind.BLOCK, ticket.slabs.blocks[block]))
            refs = [BlockRef(kind=kind.value, slab=slab) for kind, slab in slabs]  # type: ignore[arg-type]  # our enum
            if not index.extend(ticket.run, ticket.names[block], refs):
                break

    def _start(self, ticket: Ticket[int]) -> None:
        self._publish(ticket)
        forks = [
            Ticket(ticket.tokens, ticket.total_tokens, ticket.payload + i, self._on_admitted, ticket.priority)
            for i in range(1, 1 + len(ticket.fork_slots))
        ]
        before = {kind: self.pools.free(kind) for kind in KINDS}
        self.scheduler.fork(ticket, forks)
        assert before == {kind: self.pools.free(kind) for kind in KINDS}, "what is shared needs nothing"
        assert all(list(fork.slabs) == list(ticket.slabs) for fork in forks)
        self.here += forks
        for started in (ticket, *forks):
            started.tokens += 1
            self.scheduler.start(started)

    @rule(steps=st.sampled_from([1, 10, 70]))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        first = min(self._at(Place.RUNNING), key=rank, default=None)
        while (victim := self.scheduler.victim()) is not None:
            assert victim is not first, "the first one can always go on"
            assert victim is max(self._at(Place.RUNNING), key=rank)
            if self.scheduler.may_park(victim):
                self.scheduler.park(victim)
            else:
                assert sum(t.tokens for t in self._at(Place.PARKED)) + victim.tokens > self.parked_bytes_max
                self._leaves(victim)
                self.failed.append(victim)
        running = self._at(Place.RUNNING)
        ready = self.scheduler.grow()
        assert set(ready) == set(running) or (running == [first] and self._at(Place.ADMITTED)), "somebody was left out"
        for ticket in ready:
            assert self._missing(ticket) == [0, 0]
            self.scheduler.free_tail(ticket)
            if ticket.tokens == ticket.total_tokens:
                self._leaves(ticket)
            else:
                ticket.tokens += 1

    def _leaves(self, ticket: Ticket[int]) -> None:
        self.here.remove(ticket)
        self.scheduler.leave(ticket)
        self.scheduler.leave(ticket)
        assert (list(ticket.slabs), ticket.slot, ticket.fork_slots) == ([], -1, [])

    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        if self.here:
            self._leaves(data.draw(st.sampled_from(self.here)))

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        counts = [len(self._at(place)) for place in (Place.WAITING, Place.RUNNING, Place.PARKED)]
        scheduler = self.scheduler
        assert [scheduler.queued_requests, scheduler.running_requests, scheduler.parked_requests] == counts
        holders = self._at(Place.ADMITTED, Place.RUNNING)
        for kind in KINDS:
            assert all(len(set(ticket.slabs.of(kind))) == len(ticket.slabs.of(kind)) for ticket in holders)
            held = {slab for ticket in holders for slab in ticket.slabs.of(kind)}
            assert len(held) + self.pools.available(kind) == self.counts[kind], "neither held nor available"
        slots = [slot for ticket in holders for slot in (ticket.slot, *ticket.fork_slots)]
        assert len(set(slots)) == len(slots)
        assert all(not list(ticket.slabs) for ticket in self.here if ticket not in holders)
        assert self.scheduler.parked_bytes <= self.parked_bytes_max

    @invariant()
    def nobody_waits_without_need(self) -> None:
        line = self._line()
        if not line:
            return
        head = min(line, key=rank)
        holders = self._at(Place.ADMITTED, Place.RUNNING)
        room = sum((1 + len(t.fork_slots)) * (len(t.slabs.blocks) < t.total_tokens // BLOCK) for t in holders)
        room += (1 + head.forks) * (head.tokens // BLOCK < head.total_tokens // BLOCK)
        room = room if holders else 0
        run = [] if head.place is Place.PARKED else self.scheduler.index.find(head.names)
        full = head.tokens // BLOCK - len(run)
        needs = [full + room, 1 if head.tail_of % BLOCK else 0, 1 if full and self.has_sinks and not run else 0]
        idle = [slab for block in run for slab in block.slabs if self.pools.is_idle(*slab)]
        there_are = [self.pools.available(kind) - sum(of is kind for of, _ in idle) for kind in KINDS]
        pairs = [*zip(needs, there_are, strict=True), (1 + head.forks, self.scheduler.slots.free)]
        assert any(need > there_is for need, there_is in pairs)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for ticket in self._at(Place.WAITING):
            self.scheduler.submit(ticket)
        patience = sum((t.total_tokens + 1) * (1 + t.forks + len(t.fork_slots)) for t in self.here)
        while self.here:
            for ticket in self._at(Place.ADMITTED):
                self._start(ticket)
            self._step()
            patience -= 1
            assert patience >= 0, "somebody waits for ever"
        for allocator in (self.pools.blocks, self.pools.tails, self.pools.sinks, self.scheduler.slots):
            assert allocator.free + allocator.idle == allocator.count
        assert self.parked_bytes_max <= 300 or not self.failed


DecodeMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestDecodeScheduler = DecodeMachine.TestCase


def submit(scheduler: DecodeScheduler[int], ticket: Ticket[int]) -> None:
    scheduler.enter(ticket)
    scheduler.submit(ticket)


def running(scheduler: DecodeScheduler[int], *tickets: Ticket[int]) -> None:
    for ticket in tickets:
        submit(scheduler, ticket)
        assert ticket.place is Place.ADMITTED
        scheduler.start(ticket)


def ticket_of(payload: int, tokens: int, total: int, priority: int = 0) -> Ticket[int]:
    return Ticket(tokens, total, payload, lambda _: None, priority)


def test_the_youngest_of_the_lowest_priority_makes_room() -> None:
    scheduler = scheduler_of(pools_of("raw", 8, 1, 1), slots=3)
    old, young, dear = ticket_of(0, 63, 256), ticket_of(1, 63, 256), ticket_of(2, 63, 256, priority=1)
    running(scheduler, old, young, dear)
    for ticket in (old, young, dear):
        ticket.tokens = 192
    assert scheduler.victim() is young
    scheduler.park(young)
    assert scheduler.victim() is None
    assert set(scheduler.grow()) == {old, dear}
    assert (scheduler.parked_requests, scheduler.parked_bytes) == (1, 192)
    scheduler.leave(dear)
    assert young.place is Place.RUNNING, "there is room again"


def test_a_parked_one_goes_before_newcomers() -> None:
    scheduler = scheduler_of(pools_of("raw", 4, 1, 1), slots=3)
    old, young = ticket_of(0, 63, 256), ticket_of(1, 63, 256)
    running(scheduler, old, young)
    old.tokens = young.tokens = 192
    victim = scheduler.victim()
    assert victim is young
    scheduler.park(young)
    newcomer = ticket_of(2, 1, 2)
    submit(scheduler, newcomer)
    scheduler.grow()
    assert newcomer.place is Place.WAITING, "it would fit, but it is not its turn"
    scheduler.leave(old)
    assert (young.place, newcomer.place) == (Place.RUNNING, Place.ADMITTED)


@pytest.mark.parametrize("what", ["slots", "blocks"])
def test_integrity_check_can_fail(what: str) -> None:
    scheduler = scheduler_of(pools_of("raw", 1, 1, 1), slots=2)
    ticket = ticket_of(0, 64, 65)
    submit(scheduler, ticket)
    if what == "slots":
        scheduler.slots.take(1)
    else:
        scheduler.pools.blocks.give_back(list(ticket.slabs.blocks))
    with pytest.raises(AssertionError, match=r"hold 1 slots|is not held by"):
        scheduler.check_integrity()
