"""Our cluster once more, simulated plainly: a heap of events around the very schedulers, pacing, policy and admission
of the services, so that the planner's compiled simulation is compared with what they do."""

import heapq
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from zipserve.common.chunking import share
from zipserve.common.errors import OverloadedError
from zipserve.common.kv.layout import Layout
from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.decode.pacing import Pacing
from zipserve.decode.scheduler import DecodeScheduler, Place, Ticket
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.step_model import StepModel
from zipserve.planner.native.traffic import extras
from zipserve.planner.native.workers import DecodeWorker, PrefillWorker
from zipserve.planner.workload import Workload
from zipserve.prefill.scheduler import Chunk, Job, PrefillScheduler
from zipserve.router.admission import Admission
from zipserve.router.policy import Alone, InFlight, Need, Pair, Worker, choose, choose_alone

NEED = Need("m", "", 1)


@dataclass(eq=False)
class Call:
    """One request."""

    number: int
    arrived_ms: float
    prompt: int
    output: int
    cached: int
    found: int
    gaps_ms: list[float] = field(default_factory=list)
    ttft_ms: float = float("inf")
    first_ms: float = float("inf")
    last_ms: float = float("inf")
    done_ms: float = float("inf")
    computed: int = 0
    prefill: "Prefill | None" = None
    decode: "Decode | None" = None
    job: "Job[Call] | None" = None
    counted: ExitStack = field(default_factory=ExitStack)
    """What the router counts until its end."""
    prefilling: ExitStack = field(default_factory=ExitStack)

    @property
    def left(self) -> int:
        return self.prompt - self.computed

    # for `share`
    priority = 0


class CachedScheduler(PrefillScheduler[Call]):
    """What a prompt finds is a number of the request here."""

    def _try_start(self, job: Job[Call]) -> bool:
        waits = job.slot < 0
        starts = super()._try_start(job)
        if starts and waits:
            job.computed = job.payload.cached
        return starts


def pools_of(worker: PrefillWorker | DecodeWorker) -> SlabPools:
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", "raw", worker.kv.block_tokens)
    return SlabPools(layout, blocks=worker.blocks, tails=worker.tails, sinks=1)


class Prefill:
    def __init__(self, oracle: "Oracle", number: int, worker: PrefillWorker) -> None:
        self.oracle, self.station, self.worker = oracle, number, worker
        pools = pools_of(worker)
        self.scheduler = CachedScheduler(
            PrefixIndex(pools, 0),
            slots=worker.slots,
            step_tokens=worker.step_tokens,
            queue_requests_max=1 << 40,
            queue_tokens_max=1 << 40,
        )
        self.busy = False

    def record(self) -> Worker:
        return record(self.station, self.worker.kv.layout, 0)

    def enter(self, call: Call, now_ms: float) -> None:
        call.job = Job(call.prompt, float("inf"), call)
        self.scheduler.enter(call.job)
        self.scheduler.submit(call.job, now_ms)
        self.oracle.dirty.add(self.station)

    def begin(self, now_ms: float) -> None:
        chunks = self.scheduler.next_step(now_ms).chunks
        self.scheduler.check_integrity()
        if chunks:
            tokens = sum(chunk.tokens for chunk in chunks)
            pairs = sum(pairs_of(chunk.job.computed, chunk.tokens) for chunk in chunks)
            took_ms = step_ms(self.worker.step, tokens, pairs, 0, 0)
            self.busy = True
            self.oracle.at(now_ms + took_ms, self.station, lambda at_ms: self.end(chunks, took_ms, at_ms))

    def end(self, chunks: list[Chunk[Call]], took_ms: float, now_ms: float) -> None:
        self.busy = False
        self.scheduler.advance(chunks, took_ms, now_ms)
        for chunk in chunks:
            call = chunk.job.payload
            if not chunk.job.left:
                call.computed = call.prompt
                call.prefilling.close()
                call.first_ms = call.last_ms = now_ms
                call.ttft_ms = now_ms - call.arrived_ms + self.worker.overhead_ms
                assert call.decode is not None
                call.decode.enter(call)
        self.oracle.dirty.add(self.station)


class Decode:
    def __init__(self, oracle: "Oracle", number: int, worker: DecodeWorker) -> None:
        self.oracle, self.station, self.worker = oracle, number, worker
        self.scheduler: DecodeScheduler[Call] = DecodeScheduler(
            PrefixIndex(pools_of(worker), 0),
            slots=worker.slots,
            queue_requests_max=1 << 40,
            queue_tokens_max=1 << 40,
            parked_bytes_max=1 << 40,
            parked_bytes=lambda tokens: tokens,
        )
        self.pacing = Pacing(worker.step_tokens, worker.slowdown_max, worker.free_ms)
        self.busy = False
        self.parkings = 0

    def record(self) -> Worker:
        return record(self.station, self.worker.kv.layout, self.scheduler.pools.levels()["free_blocks"])

    def enter(self, call: Call) -> None:
        ticket = Ticket(call.prompt, call.prompt + call.output, call, self.on_admitted)
        if call.prefill is not None:
            ticket.tail_of = call.prompt
        self.scheduler.enter(ticket)
        self.scheduler.submit(ticket)

    def on_admitted(self, ticket: Ticket[Call]) -> None:
        call = ticket.payload
        self.oracle.dirty.add(self.station)
        if ticket.place is Place.RUNNING:  # it was parked
            return
        if call.prefill is None:
            call.computed = call.cached
            self.scheduler.start(ticket)
        else:
            self.oracle.pull(call, ticket)

    def joins(self, ticket: Ticket[Call]) -> None:
        ticket.tokens += 1
        self.scheduler.start(ticket)
        self.oracle.dirty.add(self.station)

    def begin(self, now_ms: float) -> None:
        while (victim := self.scheduler.victim()) is not None:
            self.scheduler.park(victim)
            self.parkings += 1
        ready = self.scheduler.grow()
        self.scheduler.check_integrity()
        decoding = [ticket for ticket in ready if not ticket.payload.left]
        prompts = {Ranked(ticket): ticket for ticket in ready if ticket.payload.left}
        shares = share(prompts, self.pacing.chunk_tokens(len(decoding)))
        turns = [*((ticket, 1) for ticket in decoding), *((prompts[one], tokens) for one, tokens in shares.items())]
        if not turns:
            return
        tokens = sum(shares.values())
        pairs = sum(pairs_of(one.ticket.payload.computed, tokens) for one, tokens in shares.items())
        context = sum(ticket.tokens for ticket in decoding)
        took_ms = step_ms(self.worker.step, tokens, pairs, len(decoding), context)
        self.busy = True

        def end(at_ms: float) -> None:
            self.busy = False
            self.pacing.note(len(decoding), tokens, took_ms)
            for ticket, count in turns:
                self.advance(ticket, count, at_ms)
            self.oracle.dirty.add(self.station)

        self.oracle.at(now_ms + took_ms, self.station, end)

    def advance(self, ticket: Ticket[Call], count: int, now_ms: float) -> None:
        call = ticket.payload
        self.scheduler.free_tail(ticket)
        if call.left:
            call.computed += count
            if call.left:
                return
            call.first_ms = now_ms
            call.ttft_ms = now_ms - call.arrived_ms + self.worker.overhead_ms
        else:
            call.gaps_ms.append(now_ms - call.last_ms)
        call.last_ms = now_ms
        ticket.tokens += 1
        if len(call.gaps_ms) == call.output:
            call.done_ms = now_ms
            self.scheduler.leave(ticket)
            call.counted.close()


@dataclass(frozen=True)
class Ranked:
    """A prompt as `share` sees it."""

    ticket: Ticket[Call]
    priority: int = 0

    @property
    def number(self) -> int:
        return self.ticket.number

    @property
    def left(self) -> int:
        return self.ticket.payload.left


class Link:
    def __init__(self, bytes_per_s: float, fixed_ms: float) -> None:
        self.bytes_per_ms, self.fixed_ms = bytes_per_s / 1000.0, fixed_ms
        self.free_ms = 0.0
        self.waiting: deque[Callable[[], None]] = deque()


class Oracle:
    """Runs everything; afterwards `calls` have their times."""

    def __init__(self, cluster: Cluster, workload: Workload, rate: float) -> None:
        load = extras(workload)
        columns: list[list[Any]] = [
            column.tolist() for column in (load.arrivals_ms(rate), load.prompts, load.outputs, load.cached, load.found)
        ]
        self.calls = [Call(number, *row) for number, row in enumerate(zip(*columns, strict=True))]
        self.router = cluster.router
        self.prefills = [Prefill(self, i, worker) for i, worker in enumerate(cluster.prefills)]
        self.decodes = [Decode(self, len(self.prefills) + i, worker) for i, worker in enumerate(cluster.decodes)]
        self.stations: list[Prefill | Decode] = [*self.prefills, *self.decodes]
        self.links = [Link(link.bytes_per_s, link.fixed_ms) for link in cluster.links]
        self.wires = cluster.wiring
        self.admission = Admission(self.router.requests_max, self.router.tokens_max)
        self.in_flight = InFlight()
        self.events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.turn = 0
        self.now_ms = 0.0
        self.dirty: set[int] = set()

    def at(self, at_ms: float, station: int, what: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (at_ms, station, self.turn, what))
        self.turn += 1

    def run(self) -> None:
        for call in self.calls:
            self.at(call.arrived_ms, -1, partial(self.arrive, call))
        while self.events or self.dirty:
            if self.dirty and (not self.events or self.events[0][0] > self.now_ms):
                dirty, self.dirty = sorted(self.dirty), set()
                for station in dirty:
                    if not self.stations[station].busy:
                        self.stations[station].begin(self.now_ms)
                continue
            self.now_ms, _, _, what = heapq.heappop(self.events)
            what(self.now_ms)

    def arrive(self, call: Call, now_ms: float) -> None:
        try:
            place = self.admission.enter(now_ms)
        except OverloadedError:
            return
        try:
            self.admission.reserve(place, call.prompt + call.output + 1, now_ms)
        except OverloadedError:
            self.admission.leave(place, now_ms)
            return
        decodes = [decode.record() for decode in self.decodes]
        route: Pair | Alone | None
        if self.router.is_local(call.prompt):
            route = choose_alone(decodes, NEED, self.in_flight)
        else:
            prefills = [prefill.record() for prefill in self.prefills]
            to_compute = {worker.key: call.prompt - call.cached for worker in prefills}
            route = choose(prefills, decodes, NEED, self.in_flight, (), to_compute)
        assert route is not None
        self.in_flight.picked(route)
        call.counted.callback(lambda: self.admission.leave(place, self.now_ms))
        call.counted.enter_context(self.in_flight.decoding(route.decode))
        decode = self.stations[int(route.decode.worker_id)]
        assert isinstance(decode, Decode)
        call.decode = decode
        if isinstance(route, Pair):
            prefill = self.stations[int(route.prefill.worker_id)]
            assert isinstance(prefill, Prefill)
            call.prefill = prefill
            call.prefilling.enter_context(self.in_flight.prefilling(route.prefill, call.prompt - call.cached))
            prefill.enter(call, now_ms)
        else:
            decode.enter(call)

    def pull(self, call: Call, ticket: Ticket[Call]) -> None:
        source, reader = call.prefill, call.decode
        assert source is not None
        assert reader is not None
        number = self.wires[source.station][reader.station - len(self.prefills)]
        link, kv = self.links[number], source.worker.kv
        blocks, rest = divmod(call.prompt, kv.block_tokens)
        size_bytes = (blocks - call.found) * kv.block_bytes + (kv.tail_bytes if rest else 0)
        begin_ms = max(self.now_ms + link.fixed_ms, link.free_ms)
        link.free_ms = begin_ms + size_bytes / link.bytes_per_ms

        def end(at_ms: float) -> None:
            assert call.job is not None
            source.scheduler.pools.give_back(call.job.slabs)
            self.dirty.add(source.station)
            reader.joins(ticket)

        self.at(link.free_ms, len(self.stations) + number, end)


def record(station: int, layout: str, free_blocks: int) -> Worker:
    name = layout.encode() or b"-"
    return Worker(
        worker_id=f"{station:03}",
        incarnation=0,
        address="",
        model=NEED.model,
        revision=NEED.revision,
        context_tokens=NEED.tokens,
        readable_layouts=frozenset([name]),
        writable_layout=name,
        free_blocks=free_blocks,
    )


def step_ms(model: StepModel, prompt_tokens: int, pairs: float, rows: int, context_tokens: float) -> float:
    took_ms = model.constant_ms + model.pair_ms * pairs + model.context_ms * context_tokens
    return (
        took_ms
        + rise(model.token_knots, model.token_slopes, prompt_tokens)
        + rise(model.row_knots, model.row_slopes, rows)
    )


def rise(knots: Any, slopes: Any, x: int) -> float:
    """Step by step up a curve whose knots are whole."""
    return float(sum(slopes[max(i for i, knot in enumerate(knots) if knot <= at)] for at in range(x)))


def pairs_of(before: int, tokens: int) -> int:
    """Token by token."""
    return sum(before + i + 1 for i in range(tokens))
