"""DecodeScheduler under any order of calls: first come first served, no slab twice, all slabs back in the end."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.decode.scheduler import DecodeScheduler, Reservation, Ticket

BLOCK = 64
KINDS = (SlabKind.BLOCK, SlabKind.TAIL, SlabKind.SINKS)


def pools_of(codec: str, blocks: int, tails: int, sinks: int) -> SlabPools:
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", codec, BLOCK)
    return SlabPools(layout, blocks=blocks, tails=tails, sinks=sinks)


class DecodeMachine(RuleBasedStateMachine):
    """Sequences come, wait, hold slabs, drop their tail, and end, in any order; some are gone when their turn comes."""

    @initialize(
        codec=st.sampled_from(["raw", "zip-4/32"]),
        blocks=st.integers(1, 8),
        tails=st.integers(1, 3),
        sinks=st.integers(1, 3),
        slots=st.integers(1, 4),
    )
    def start(self, codec: str, blocks: int, tails: int, sinks: int, slots: int) -> None:
        self.has_sinks = codec != "raw"
        self.pools = pools_of(codec, blocks, tails, sinks)
        self.scheduler = DecodeScheduler(self.pools, slots=slots, queue_requests_max=4, queue_tokens_max=1200)
        self.waiting: list[Ticket] = []
        self.held: dict[int, tuple[Ticket, Reservation]] = {}
        self.admitted: list[int] = []
        self.count = 0
        self.gone: set[int] = set()

    @rule(pulled=st.integers(1, 320), new=st.integers(1, 320), gone=st.booleans())
    def submit(self, pulled: int, new: int, gone: bool) -> None:
        number, total = self.count, pulled + new
        needed = total // BLOCK

        def on_reserved(reservation: Reservation) -> None:
            self.admitted.append(number)
            self.waiting = [other for other in self.waiting if other is not ticket]
            self._check(ticket, reservation)
            if number in self.gone:
                self.scheduler.free(reservation)  # the caller went away in this very moment
            else:
                self.held[number] = (ticket, reservation)

        ticket = Ticket(pulled, total, on_reserved)
        if gone:
            self.gone.add(number)
        queued = sum(other.total_tokens for other in self.waiting)
        if needed > self.pools.blocks.count:
            with pytest.raises(InvalidRequestError, match=f"{total} tokens needs {needed} KV blocks"):
                self.scheduler.submit(ticket)
            return
        if len(self.waiting) >= 4:
            with pytest.raises(OverloadedError, match="4 sequences wait, the limit is 4"):
                self.scheduler.submit(ticket)
            return
        if self.waiting and queued + total > 1200:
            with pytest.raises(OverloadedError, match=f"of {queued} tokens wait and one of {total} came, the limit is"):
                self.scheduler.submit(ticket)
            return
        self.count += 1
        self.waiting.append(ticket)
        self.scheduler.submit(ticket)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.waiting:
            ticket = data.draw(st.sampled_from(self.waiting))
            self.waiting = [other for other in self.waiting if other is not ticket]
            self.scheduler.cancel(ticket)
            self.scheduler.cancel(ticket)

    @rule(data=st.data())
    def drop_tail(self, data: st.DataObject) -> None:
        if self.held:
            _, reservation = self.held[data.draw(st.sampled_from(sorted(self.held)))]
            self.scheduler.free_tail(reservation)
            self.scheduler.free_tail(reservation)
            assert reservation.slabs.tails == []

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.held:
            ticket, reservation = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
            self.scheduler.free(reservation)
            self.scheduler.cancel(ticket)  # no longer waits: nothing happens

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert self.admitted == sorted(self.admitted), "somebody was overtaken"
        assert self.scheduler.queued_requests == len(self.waiting)
        reservations = [reservation for _, reservation in self.held.values()]
        for allocator, held in (
            *(
                (allocator, [slab for r in reservations for slab in r.slabs.of(kind)])
                for kind, allocator in zip(KINDS, (self.pools.blocks, self.pools.tails, self.pools.sinks), strict=True)
            ),
            (self.scheduler.slots, [r.slot for r in reservations]),
        ):
            assert len(set(held)) == len(held), "given out twice"
            assert allocator.free + len(held) == allocator.count, "lost"

    @invariant()
    def nobody_waits_without_need(self) -> None:
        if self.waiting:
            head = self.waiting[0]
            needs = [*self._needs(head), 1]
            pools = (self.pools.blocks, self.pools.tails, self.pools.sinks, self.scheduler.slots)
            free = [pool.free for pool in pools]
            assert any(n > f for n, f in zip(needs, free, strict=True))

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.held:
            _, reservation = self.held.pop(min(self.held))
            self.scheduler.free(reservation)
        assert not self.waiting, "somebody waits for ever"
        for allocator in (self.pools.blocks, self.pools.tails, self.pools.sinks, self.scheduler.slots):
            assert allocator.free == allocator.count

    def _check(self, ticket: Ticket, reservation: Reservation) -> None:
        assert [len(reservation.slabs.of(kind)) for kind in KINDS] == self._needs(ticket)

    def _needs(self, ticket: Ticket) -> list[int]:
        """Slabs of each of KINDS."""
        full = ticket.total_tokens // BLOCK
        return [full, 1 if ticket.pulled_tokens % BLOCK else 0, 1 if full and self.has_sinks else 0]


DecodeMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestDecodeScheduler = DecodeMachine.TestCase


def test_integrity_check_can_fail() -> None:
    scheduler = DecodeScheduler(pools_of("raw", 1, 1, 1), slots=1, queue_requests_max=1, queue_tokens_max=1)
    scheduler.queued_tokens = 1
    with pytest.raises(AssertionError, match="queued_tokens"):
        scheduler.check_integrity()
