"""Pulls sequences in or computes their prompts, steps all of them together, and hands out their tokens."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

from zipserve.common import log, tracing
from zipserve.common.chunking import share
from zipserve.common.errors import (
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    ZipserveError,
)
from zipserve.common.kv.pools import Slabs
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.steps import Step
from zipserve.common.transfer.fetch import PrefixFetcher
from zipserve.common.transfer.puller import KvPuller
from zipserve.common.transfer.source import KvSource
from zipserve.decode.batch import Batch, Outcome, Turn, step_of
from zipserve.decode.checkpoints import Checkpoints, check_chain, local_slabs
from zipserve.decode.pacing import Pacing
from zipserve.decode.scheduler import DecodeScheduler, Ticket
from zipserve.decode.stream import Computed, Continuation, Finish, Stream
from zipserve.engine.device import Device
from zipserve.engine.sampling import Drawn
from zipserve.engine.sequence import Sequence
from zipserve.v1 import kv_pb2
from zipserve.v1.sampling_pb2 import FinishReason

_log = log.get()


class DecodeWorker:
    """All sequences of one decode worker. Lives in the event loop."""

    def __init__(
        self,
        device: Device,
        scheduler: DecodeScheduler[Stream],
        checkpoints: Checkpoints,
        source: KvSource,
        puller: KvPuller,
        fetcher: PrefixFetcher,
        pacing: Pacing,
        metrics: Metrics,
    ) -> None:
        self._device = device
        self._scheduler = scheduler
        self._checkpoints = checkpoints
        self._batch = Batch(device, checkpoints)
        self._source = source
        self._puller = puller
        self._fetcher = fetcher
        self._pacing = pacing
        self._metrics = metrics
        self._in_use: list[Stream] = []
        """Streams whose slabs the device is working on."""
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests = 0
        self.draining = False

    @asynccontextmanager
    async def pulled(
        self, handle: kv_pb2.KvHandle, continuations: SequenceOf[Continuation], deadline: Deadline
    ) -> AsyncIterator[list[Stream]]:
        """Admits, pulls, verifies and joins sequences that go on from the same KV. Leaving the context frees all of
        them, at any point.

        Args:
            continuations: of each sequence, at least one; they differ in newest token and sampling only.

        Raises:
            DrainingError, OverloadedError, InvalidRequestError: they were not accepted.
            HandoffError: their KV could not be read, or its lease was lost while it waited; everything is freed again.
            DeadlineError: waiting or reading took too long.
        """
        with self._counted(), ExitStack() as opened:
            claims = self._puller.open(handle)
            check_chain(claims, continuations[0].chain)
            total = claims.tokens + continuations[0].max_new_tokens
            streams = [opened.enter_context(self._opened(one, claims.tokens, total)) for one in continuations]
            first, *siblings = streams
            first.ticket.tail_of, first.ticket.forks = claims.tokens, len(siblings)
            if first.continuation.chain is not None:
                first.ticket.names = list(first.continuation.chain.names)
            async with self._puller.lease(claims, continuations[0].request_id) as lease:
                self._scheduler.enter(first.ticket)
                await lease.while_alive(self._admitted(first, deadline))
                first.pulled = await lease.pull(local_slabs(claims, first), deadline)
            await self._checkpoints.share_pulled(first, claims.tokens)
            self._scheduler.fork(first.ticket, [sibling.ticket for sibling in siblings])
            for index, stream in enumerate(streams):
                stream.index, stream.output = index, first.output
                stream.sequence.length, stream.first_position = claims.tokens, claims.tokens + 1
                stream.ticket.tokens += 1
                self._join(stream)
            yield streams

    @asynccontextmanager
    async def computed(self, continuation: Continuation, deadline: Deadline) -> AsyncIterator[Stream]:
        """Admits and joins a sequence whose prompt is computed here. Leaving the context frees everything.

        Raises:
            DrainingError, OverloadedError, InvalidRequestError: it was not accepted.
            DeadlineError: waiting took too long.
        """
        tokens = len(continuation.prompt)
        with self._counted(), self._opened(continuation, tokens, tokens + continuation.max_new_tokens - 1) as stream:
            if continuation.chain is not None and continuation.sampling.params.prompt_logprobs is None:
                block_tokens = self._device.layout.block_tokens
                stream.ticket.names = continuation.chain.names[: (tokens - 1) // block_tokens]
            self._scheduler.enter(stream.ticket)
            await self._fetcher.fetch(stream.ticket.names, deadline, continuation.request_id)
            await self._admitted(stream, deadline)
            stream.cached_tokens = stream.sequence.length = len(stream.ticket.run) * self._device.layout.block_tokens
            self._join(stream)
            yield stream

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self.draining:
            raise DrainingError("this decode worker is going away")
        self._requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    @contextmanager
    def _opened(self, continuation: Continuation, tokens: int, total: int) -> Iterator[Stream]:
        """A stream of `tokens` tokens now and `total` in the end; ended with the context."""
        if tokens + continuation.max_new_tokens > self._device.context_tokens:
            raise InvalidRequestError(
                f"{tokens} tokens and {continuation.max_new_tokens} new ones exceed the context of "
                f"{self._device.context_tokens}",
                field="max_new_tokens",
            )
        stream = Stream(continuation, tokens, continuation.token_id)
        stream.ticket = Ticket(tokens, total, stream, self._on_admitted, continuation.priority)
        stream.sequence = Sequence(stream.ticket.slabs.blocks, -1)
        try:
            yield stream
        finally:
            self._end(stream)

    def _join(self, stream: Stream) -> None:
        stream.joined_s = time.monotonic()
        self._scheduler.start(stream.ticket)
        self._work.set()

    @property
    def shares_nothing(self) -> bool:
        """Whether no block is found by others, nor by later sequences."""
        return self._scheduler.index.is_off

    async def drained(self) -> None:
        """Returns when no sequence is left, and nobody reads here."""
        await self._idle.wait()
        await self._source.no_leases()

    def free(self, slabs: Slabs) -> None:
        """Takes slabs back whose lease has ended."""
        self._scheduler.give_back(slabs)
        self._work.set()

    async def run(self) -> None:
        """Steps all running sequences, for ever."""
        while True:
            await self._work.wait()
            self._work.clear()
            while (victim := self._scheduler.victim()) is not None:
                await self._make_room(victim.payload)
            started_s = time.monotonic()
            turns = self._turns([ticket.payload for ticket in self._scheduler.grow()])
            if turns:
                await self._run_step(turns, started_s)
                self._work.set()

    def _turns(self, streams: list[Stream]) -> list[Turn]:
        """Who computes how many tokens in the next step: all that decode one each, prompts share what that allows."""
        decoding = [stream for stream in streams if not stream.left]
        prompts = [stream for stream in streams if stream.left]
        shares = share(prompts, self._pacing.chunk_tokens(len(decoding)))
        return [*((stream, 1) for stream in decoding), *shares.items()]

    async def _run_step(self, turns: list[Turn], started_s: float) -> None:
        step = step_of(turns)
        self._in_use = [stream for stream, _ in turns]
        for stream, tokens in turns:
            stream.place()
            self._checkpoints.plan(stream, tokens)
        outcomes = await self._try_step(turns, step)
        self._in_use = []
        for (stream, _), outcome in zip(turns, outcomes, strict=True):
            if isinstance(outcome, ZipserveError):
                self._finish(stream, outcome)
            elif not stream.gone:
                self._advance(stream, outcome)
            if stream.gone:
                self._free(stream)
        if not any(isinstance(outcome, ZipserveError) for outcome in outcomes):
            self._metrics.steps.note(replace(step, seconds=time.monotonic() - started_s))

    async def _try_step(self, turns: list[Turn], step: Step) -> list[Outcome]:
        started_s = time.monotonic()
        try:
            outcomes = await self._device.run(self._batch.step, turns)
        except Exception:  # noqa: BLE001  # one bad step must not end the worker
            _log.exception("step.failed", requests=[stream.continuation.request_id for stream, _ in turns])
            error = UnavailableError("a decode step failed; the worker's log has the details")
            return [error for _ in turns]
        seconds = time.monotonic() - started_s
        self._pacing.note(step.rows, step.prompt_tokens, seconds)
        self._metrics.step_seconds.observe(seconds)
        return outcomes

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
            stream.parkings += 1
            _log.debug("sequence.parked", request_id=stream.continuation.request_id, tokens=stream.sequence.length)

    async def _try_park(self, stream: Stream) -> None:
        stream.place()
        self._in_use = [stream]
        try:
            stream.parked = await self._device.run(self._batch.park, stream)
        except Exception:  # noqa: BLE001  # it ends one sequence, not the worker
            _log.exception("parking.failed", request_id=stream.continuation.request_id)
            self._finish(stream, UnavailableError("a sequence could not be parked; the worker's log has the details"))
        finally:
            self._in_use = []

    def _advance(self, stream: Stream, drawn: Drawn | None) -> None:
        """After a step: its slabs are filled, and it has a new token unless its prompt goes on."""
        stream.parked = None
        self._scheduler.free_tail(stream.ticket)
        self._checkpoints.publish(stream)
        if drawn is None:
            return
        if stream.continuation.prompt and not stream.generated:
            compute_s = time.monotonic() - stream.joined_s
            stream.output.put_nowait(
                (stream.index, Computed(stream.cached_tokens, stream.queue_s, compute_s, stream.prompt_logprobs))
            )
            self._metrics.prompt_tokens.inc(len(stream.continuation.prompt))
            self._metrics.cached_prompt_tokens.inc(stream.cached_tokens)
            self._metrics.prompt_seconds.observe(compute_s)
        token_id = drawn.token_id
        stream.output.put_nowait((stream.index, drawn))
        stream.next_input = token_id
        stream.generated += 1
        stream.ticket.tokens += 1
        self._metrics.generated_tokens.inc()
        if drawn.complete or token_id in stream.continuation.stop_token_ids:
            self._finish(stream, Finish(FinishReason.FINISH_REASON_STOP))
        elif stream.generated >= stream.continuation.max_new_tokens:
            self._finish(stream, Finish(FinishReason.FINISH_REASON_LENGTH))

    def stop(self, stream: Stream) -> None:
        """Ends a stream whose reader has all that it wants; nothing happens when it has ended."""
        self._finish(stream, Finish(FinishReason.FINISH_REASON_STOP))
        self._end(stream)

    def _finish(self, stream: Stream, how: Finish | ZipserveError) -> None:
        if not stream.gone:
            stream.output.put_nowait((stream.index, how))
            stream.gone = True

    def _end(self, stream: Stream) -> None:
        """Nobody reads the stream any more."""
        stream.gone = True
        if stream not in self._in_use:
            self._free(stream)

    def _free(self, stream: Stream) -> None:
        stream.parked = None
        self._scheduler.leave(stream.ticket)
        self._work.set()  # what it held may be what the others wait for

    def _on_admitted(self, ticket: Ticket[Stream]) -> None:
        ticket.payload.admitted.set()
        self._work.set()

    async def _admitted(self, stream: Stream, deadline: Deadline) -> None:
        """Lets a stream that has a place in the queue start, and waits until it has slabs, of sound blocks those that
        are here."""
        started_s = time.monotonic()
        try:
            with tracing.span("queue"):
                async with asyncio.timeout(deadline.remaining_s()):
                    self._scheduler.submit(stream.ticket)
                    await stream.admitted.wait()
                    while not await self._checkpoints.are_sound(stream):
                        stream.admitted.clear()
                        self._scheduler.restart(stream.ticket)
                        await stream.admitted.wait()
        except TimeoutError as error:
            raise DeadlineError("the deadline passed while waiting for KV blocks on the decode worker") from error
        finally:
            stream.queue_s = time.monotonic() - started_s
            self._metrics.queue_seconds.observe(stream.queue_s)
