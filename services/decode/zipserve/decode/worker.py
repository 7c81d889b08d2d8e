"""Pulls sequences in, steps all of them together, and hands out their tokens."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from zipserve.common import log
from zipserve.common.errors import (
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    UnavailableError,
    ZipserveError,
)
from zipserve.common.kv.layout import SlabKind
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.transfer.puller import KvPuller, PullStats
from zipserve.decode.scheduler import DecodeScheduler, Reservation, Ticket
from zipserve.engine.device import Device
from zipserve.engine.sampling import Drawn, Sampler, draw
from zipserve.engine.sequence import Segment, Sequence
from zipserve.v1 import kv_pb2
from zipserve.v1.sampling_pb2 import FinishReason

_log = log.get()


@dataclass(frozen=True)
class Continuation:
    """What to generate after the pulled KV."""

    request_id: str
    token_id: int
    """Newest token of the sequence, whose KV is computed here."""
    sampling: Sampler
    max_new_tokens: int
    stop_token_ids: frozenset[int]


@dataclass(eq=False)
class Stream:
    """A sequence in the batch, from its pulled KV to its last token."""

    continuation: Continuation
    reservation: Reservation
    sequence: Sequence
    pulled: PullStats
    queue_s: float
    first_position: int
    """Position of the first token that is generated here."""
    next_input: int
    generated: int = 0
    gone: bool = False
    """Finished, failed or abandoned; freed as soon as no step is using it."""
    freed: bool = False
    output: "asyncio.Queue[Drawn | Finish | ZipserveError]" = field(default_factory=asyncio.Queue)
    """Tokens, then what ended the stream; never more than max_new_tokens + 1 entries."""


@dataclass(frozen=True)
class Finish:
    """Why a stream ended."""

    reason: FinishReason.ValueType


_Outcome = Drawn | ZipserveError
"""Of one stream of a step: its next token, or why it failed."""


class DecodeWorker:
    """All sequences of one decode worker. Lives in the event loop; `_step` does not."""

    def __init__(self, device: Device, scheduler: DecodeScheduler, puller: KvPuller, metrics: Metrics) -> None:
        self._device = device
        self._scheduler = scheduler
        self._puller = puller
        self._metrics = metrics
        self._running: list[Stream] = []
        self._stepping: list[Stream] = []
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests = 0
        self.draining = False

    @property
    def running_requests(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @asynccontextmanager
    async def stream(
        self, handle: kv_pb2.KvHandle, continuation: Continuation, deadline: Deadline
    ) -> AsyncIterator[Stream]:
        """Reserves, pulls, verifies and joins a sequence. Leaving the context frees everything, at any point.

        Raises:
            DrainingError, OverloadedError, InvalidRequestError: it was not accepted.
            HandoffError: its KV could not be read; everything is freed again.
            DeadlineError: waiting or reading took too long.
        """
        if self.draining:
            raise DrainingError("this decode worker is going away")
        self._requests += 1
        self._idle.clear()
        reservation: Reservation | None = None
        stream: Stream | None = None
        try:
            claims = self._puller.open(handle)
            async with self._puller.lease(claims, continuation.request_id) as lease:
                started_s = time.monotonic()
                reservation = await self._reserve(claims.tokens, continuation.max_new_tokens, deadline)
                queue_s = time.monotonic() - started_s
                # each reference gets the next slab of its kind; those behind them wait for tokens to come
                free = {kind: iter(reservation.slabs.of(kind)) for kind in SlabKind}
                pulled = await lease.pull([next(free[SlabKind(ref.kind)]) for ref in claims.refs], deadline)
            slabs = reservation.slabs
            sequence = Sequence(slabs.blocks, reservation.slot, claims.tokens, next(iter(slabs.sinks), -1))
            stream = Stream(
                continuation, reservation, sequence, pulled, queue_s, claims.tokens + 1, continuation.token_id
            )
            self._running.append(stream)
            self._work.set()
            yield stream
        finally:
            if stream is not None:
                self._end(stream)
            elif reservation is not None:
                self._scheduler.free(reservation)
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def drained(self) -> None:
        """Returns when no sequence is left."""
        await self._idle.wait()

    async def run(self) -> None:
        """Steps all running sequences, for ever."""
        while True:
            await self._work.wait()
            if not self._running:
                self._work.clear()
                continue
            self._stepping = self._running[:]
            self._metrics.running_requests.set(len(self._stepping))
            outcomes = await self._try_step(self._stepping)
            stepped, self._stepping = self._stepping, []
            for stream, outcome in zip(stepped, outcomes, strict=True):
                if isinstance(outcome, ZipserveError):
                    self._finish(stream, outcome)
                elif not stream.gone:
                    self._advance(stream, outcome)
                if stream.gone:
                    self._free(stream)

    async def _try_step(self, streams: list[Stream]) -> list[_Outcome]:
        started_s = time.monotonic()
        try:
            return await self._device.run(self._step, streams)
        except Exception:  # noqa: BLE001  # one bad step must not end the worker
            _log.exception("step.failed", requests=[s.continuation.request_id for s in streams])
            error = UnavailableError("a decode step failed; the worker's log has the details")
            return [error for _ in streams]
        finally:
            self._metrics.step_seconds.observe(time.monotonic() - started_s)

    def _advance(self, stream: Stream, drawn: Drawn) -> None:
        token_id = drawn.token_id
        self._scheduler.free_tail(stream.reservation)
        stream.output.put_nowait(drawn)
        stream.next_input = token_id
        stream.continuation.sampling.append(token_id)
        stream.generated += 1
        self._metrics.generated_tokens.inc()
        if token_id in stream.continuation.stop_token_ids:
            self._finish(stream, Finish(FinishReason.FINISH_REASON_STOP))
        elif stream.generated >= stream.continuation.max_new_tokens:
            self._finish(stream, Finish(FinishReason.FINISH_REASON_LENGTH))

    def _finish(self, stream: Stream, how: Finish | ZipserveError) -> None:
        stream.output.put_nowait(how)
        stream.gone = True

    def _end(self, stream: Stream) -> None:
        """Nobody reads the stream any more."""
        stream.gone = True
        if stream not in self._stepping:
            self._free(stream)

    def _free(self, stream: Stream) -> None:
        if not stream.freed:
            stream.freed = True
            self._running.remove(stream)
            self._scheduler.free(stream.reservation)
            self._metrics.free_blocks.set(self._scheduler.pools.blocks.free)

    async def _reserve(self, pulled_tokens: int, max_new_tokens: int, deadline: Deadline) -> Reservation:
        total = pulled_tokens + max_new_tokens
        if total > self._device.context_tokens:
            raise InvalidRequestError(
                f"{pulled_tokens} tokens and {max_new_tokens} new ones exceed the context of "
                f"{self._device.context_tokens}",
                field="max_new_tokens",
            )
        reserved: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()

        def on_reserved(reservation: Reservation) -> None:
            if reserved.done():
                self._scheduler.free(reservation)  # the caller has just been cancelled
            else:
                reserved.set_result(reservation)

        ticket = Ticket(pulled_tokens, total, on_reserved)
        self._scheduler.submit(ticket)
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                return await reserved
        except BaseException as error:
            self._scheduler.cancel(ticket)
            if reserved.done() and not reserved.cancelled():
                self._scheduler.free(reserved.result())
            if isinstance(error, TimeoutError):
                raise DeadlineError("the deadline passed while waiting for KV blocks on the decode worker") from error
            raise

    # In the device's thread.

    def _step(self, streams: list[Stream]) -> list[_Outcome]:
        for stream in streams:
            tails = stream.reservation.slabs.tails
            if tails:
                open_tokens = stream.sequence.length % self._device.layout.block_tokens
                self._device.cache.unpack_tail(tails[0], open_tokens, stream.reservation.slot)
        step = self._device.engine.forward([Segment(s.sequence, [s.next_input]) for s in streams])
        positions = [s.first_position + s.generated for s in streams]
        tokens = draw(step.logits, [s.continuation.sampling for s in streams], positions)
        return [step.failed.get(i) or drawn for i, drawn in enumerate(tokens)]
