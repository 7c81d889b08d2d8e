"""Pulls sequences in, steps all of them together, and hands out their tokens."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from zipserve.common import log
from zipserve.common.errors import (
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    ZipserveError,
)
from zipserve.common.kv.layout import SlabKind
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.transfer.puller import KvPuller
from zipserve.decode.scheduler import DecodeScheduler, Ticket
from zipserve.decode.stream import Continuation, Finish, Stream
from zipserve.engine.device import Device
from zipserve.engine.parking import ParkedKv, park, restore
from zipserve.engine.sampling import Drawn, draw
from zipserve.engine.sequence import Segment, Sequence
from zipserve.v1 import kv_pb2
from zipserve.v1.sampling_pb2 import FinishReason

_log = log.get()

_Outcome = Drawn | ZipserveError
"""Of one stream of a step: its next token, or why it failed."""


class DecodeWorker:
    """All sequences of one decode worker. Lives in the event loop; `_step` and `_park` do not."""

    def __init__(self, device: Device, scheduler: DecodeScheduler[Stream], puller: KvPuller, metrics: Metrics) -> None:
        self._device = device
        self._scheduler = scheduler
        self._puller = puller
        self._metrics = metrics
        self._in_use: list[Stream] = []
        """Streams whose slabs the device is working on."""
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests = 0
        self.draining = False

    @asynccontextmanager
    async def stream(
        self, handle: kv_pb2.KvHandle, continuation: Continuation, deadline: Deadline
    ) -> AsyncIterator[Stream]:
        """Admits, pulls, verifies and joins a sequence. Leaving the context frees everything, at any point.

        Raises:
            DrainingError, OverloadedError, InvalidRequestError: it was not accepted.
            HandoffError: its KV could not be read, or its lease was lost while it waited; everything is freed again.
            DeadlineError: waiting or reading took too long.
        """
        if self.draining:
            raise DrainingError("this decode worker is going away")
        self._requests += 1
        self._idle.clear()
        stream: Stream | None = None
        try:
            claims = self._puller.open(handle)
            stream = self._new_stream(continuation, claims.tokens)
            async with self._puller.lease(claims, continuation.request_id) as lease:
                started_s = time.monotonic()
                self._scheduler.submit(stream.ticket)
                await lease.while_alive(self._admitted(stream, deadline))
                stream.queue_s = time.monotonic() - started_s
                free = {kind: iter(stream.ticket.slabs.of(kind)) for kind in SlabKind}
                stream.pulled = await lease.pull([next(free[SlabKind(ref.kind)]) for ref in claims.refs], deadline)
            stream.ticket.tokens = claims.tokens + 1
            self._scheduler.start(stream.ticket)
            self._work.set()
            yield stream
        finally:
            if stream is not None:
                self._end(stream)
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
            self._work.clear()
            while (victim := self._scheduler.victim()) is not None:
                await self._make_room(victim.payload)
            streams = [ticket.payload for ticket in self._scheduler.grow()]
            self._note_levels()
            if streams:
                await self._run_step(streams)
                self._work.set()

    async def _run_step(self, streams: list[Stream]) -> None:
        for stream in streams:
            stream.place()
        self._in_use = streams
        outcomes = await self._try_step(streams)
        self._in_use = []
        for stream, outcome in zip(streams, outcomes, strict=True):
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

    async def _make_room(self, stream: Stream) -> None:
        """Parks a stream, or ends it where there is no room to park."""
        if not self._scheduler.may_park(stream.ticket):
            self._finish(stream, OverloadedError("KV blocks ran out, and so did the memory for parked sequences"))
            self._free(stream)
            return
        if stream.parked is None:  # else it has not run since it was brought back
            await self._try_park(stream)
        if stream.gone:
            self._free(stream)
        else:
            self._scheduler.park(stream.ticket)
            self._metrics.parkings.inc()
            _log.info("sequence.parked", request_id=stream.continuation.request_id, tokens=stream.sequence.length)

    async def _try_park(self, stream: Stream) -> None:
        stream.place()
        self._in_use = [stream]
        try:
            stream.parked = await self._device.run(self._park, stream)
        except Exception:  # noqa: BLE001  # it ends one sequence, not the worker
            _log.exception("parking.failed", request_id=stream.continuation.request_id)
            self._finish(stream, UnavailableError("a sequence could not be parked; the worker's log has the details"))
        finally:
            self._in_use = []

    def _advance(self, stream: Stream, drawn: Drawn) -> None:
        token_id = drawn.token_id
        stream.parked = None
        self._scheduler.free_tail(stream.ticket)
        stream.output.put_nowait(drawn)
        stream.next_input = token_id
        stream.continuation.sampling.append(token_id)
        stream.generated += 1
        stream.ticket.tokens += 1
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
        if stream not in self._in_use:
            self._free(stream)

    def _free(self, stream: Stream) -> None:
        stream.parked = None
        self._scheduler.leave(stream.ticket)
        self._note_levels()
        self._work.set()  # what it held may be what the others wait for

    def _note_levels(self) -> None:
        scheduler, metrics = self._scheduler, self._metrics
        metrics.running_requests.set(scheduler.running_requests)
        metrics.queued_requests.set(scheduler.queued_requests)
        metrics.parked_requests.set(scheduler.parked_requests)
        metrics.parked_bytes.set(scheduler.parked_bytes)
        metrics.free_blocks.set(scheduler.pools.blocks.free)

    def _new_stream(self, continuation: Continuation, tokens: int) -> Stream:
        total = tokens + continuation.max_new_tokens
        if total > self._device.context_tokens:
            raise InvalidRequestError(
                f"{tokens} tokens and {continuation.max_new_tokens} new ones exceed the context of "
                f"{self._device.context_tokens}",
                field="max_new_tokens",
            )
        stream = Stream(continuation, tokens + 1, continuation.token_id)
        stream.ticket = Ticket(tokens, total, stream, self._on_admitted, continuation.priority, tail_of=tokens)
        stream.sequence = Sequence(stream.ticket.slabs.blocks, -1, tokens)
        return stream

    def _on_admitted(self, ticket: Ticket[Stream]) -> None:
        ticket.payload.admitted.set()
        self._work.set()

    async def _admitted(self, stream: Stream, deadline: Deadline) -> None:
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await stream.admitted.wait()
        except TimeoutError as error:
            raise DeadlineError("the deadline passed while waiting for KV blocks on the decode worker") from error

    # In the device's thread.

    def _step(self, streams: list[Stream]) -> list[_Outcome]:
        for stream in streams:
            self._open(stream)
        step = self._device.engine.forward([Segment(s.sequence, [s.next_input]) for s in streams])
        positions = [s.first_position + s.generated for s in streams]
        tokens = draw(step.logits, [s.continuation.sampling for s in streams], positions)
        return [step.failed.get(i) or drawn for i, drawn in enumerate(tokens)]

    def _park(self, stream: Stream) -> ParkedKv:
        self._open(stream)
        return park(self._device.cache, stream.sequence)

    def _open(self, stream: Stream) -> None:
        """Fills the open block of a stream that has just come: from its tail, or from where it was parked."""
        tails = stream.ticket.slabs.tails
        if stream.parked is not None:
            restore(self._device.cache, stream.parked, stream.sequence)
        elif tails:
            open_tokens = stream.sequence.length % self._device.layout.block_tokens
            self._device.cache.unpack_tail(tails[0], open_tokens, stream.sequence.slot)
