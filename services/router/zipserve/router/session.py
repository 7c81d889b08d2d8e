"""One request's way over the workers: pick a pair, prefill, decode, and again from the emitted tokens when one fails.

What the client has seen is in the transcript; a replay prefills prompt and transcript and goes on behind it. Knows no
gRPC: workers are reached through the `Workers` interface.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from zipserve.common import log
from zipserve.common.errors import (
    DeadlineError,
    HandoffError,
    InternalError,
    NoWorkerError,
    OverloadedError,
    WorkerLostError,
    ZipserveError,
)
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.sampling import Sampling
from zipserve.router.job import Job
from zipserve.router.policy import Alone, InFlight, Need, Pair, Worker, WorkerKey, choose, choose_alone, missing
from zipserve.router.transcript import Chunk, Transcript
from zipserve.v1.decode_service_pb2 import Computed, DecodeRequest, DecodeResponse, Pulled
from zipserve.v1.inference_service_pb2 import PromptLogprobs
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse
from zipserve.v1.sampling_pb2 import FinishReason, TokenLogprobs

_log = log.get()

_BACKOFF_MAX_S = 1.0
_SETTLE_S = 1.0
"""How long the end of a stream is waited for after its last token is known."""


class Workers(Protocol):
    """The workers, as a session reaches them. Calls raise ZipserveError."""

    def prefills(self) -> Sequence[Worker]:
        """Prefill workers that take work."""

    def decodes(self) -> Sequence[Worker]:
        """Decode workers that take work."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns when there may be news of the workers, or after the time."""

    async def prefill(self, worker: Worker, request: PrefillRequest, timeout_s: float) -> PrefillResponse:
        """Computes a prompt."""

    def decode(self, worker: Worker, request: DecodeRequest, timeout_s: float) -> AsyncGenerator[DecodeResponse, None]:
        """Continues a sequence. Closing the generator cancels the call."""

    def release(self, worker: Worker, handle: KvHandle, request_id: str) -> None:
        """Gives up a handle, in the background."""

    def report_lost(self, worker: Worker) -> None:
        """Hides a worker that could not be reached, until it shows that it lives."""


@dataclass(frozen=True)
class Rules:
    """How patient a session is."""

    worker_wait_s: float
    attempts_max: int
    local_prefill_tokens_max: int = 0
    """Longest sequence that is computed on the decode worker; 0: none, -1: any."""
    backoff_s: float = 0.02
    """Pause after the first failed attempt; doubles with every further one."""


@dataclass
class Report:
    """What a request took, over all attempts. Times in seconds."""

    replays: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    first_token_at_s: float | None = None
    last_token_at_s: float | None = None
    kv_bytes: int = 0
    kv_blocks: int = 0
    kv_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""

    def count_prefill(self, answer: PrefillResponse) -> None:
        """Adds what a prefill took."""
        self.queue_s += to_seconds(answer.queue_time)
        self.prefill_s += to_seconds(answer.compute_time)

    def count_computed(self, computed: Computed) -> None:
        """Adds what computing the prompt on a decode worker took."""
        self.queue_s += to_seconds(computed.queue_time)
        self.prefill_s += to_seconds(computed.compute_time)

    def count_pull(self, pulled: Pulled, tokens: int) -> None:
        """Adds what moved to a decode worker."""
        self.transfer_s += to_seconds(pulled.transfer_time) + to_seconds(pulled.verify_time)
        self.kv_bytes += pulled.bytes
        self.kv_blocks += pulled.blocks
        self.kv_tokens += tokens


class Session:
    """The run of one job."""

    def __init__(
        self,
        job: Job,
        need: Need,
        transcript: Transcript,
        workers: Workers,
        in_flight: InFlight,
        deadline: Deadline,
        rules: Rules,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.report = Report()
        self._job = job
        self._need = need
        self._transcript = transcript
        self._workers = workers
        self._in_flight = in_flight
        self._deadline = deadline
        self._rules = rules
        self._metrics = metrics
        self._now = now
        self._failed: set[WorkerKey] = set()
        self._overloads: dict[WorkerKey, tuple[float, OverloadedError]] = {}
        """Until when a worker wants to be left alone, and its words."""
        self._failures = 0
        """Attempts in a row that got no further than the prompt."""
        self._called: Worker | None = None
        """Who was called last."""

    async def run(self) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        """Generates until the transcript has ended. Closing it cancels what runs and gives up what is held.

        Raises:
            NoWorkerError: no pair of workers could serve this in time.
            ZipserveError: an error that a replay cannot help, or the last one when all attempts failed.
        """
        while self._transcript.finish is None:
            route = await self._next_route()
            tokens_before = len(self._transcript.token_ids)
            try:
                async with aclosing(self._attempt(route)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except ZipserveError as error:
                # a first token proves nothing: with a broken handoff every prefill would still yield one
                if len(self._transcript.token_ids) - tokens_before > 1:
                    self._failures = 0
                self._note_failure(error, route)
                backoff_s = min(self._rules.backoff_s * 2 ** (self._failures - 1), _BACKOFF_MAX_S)
                await asyncio.sleep(self._deadline.remaining_s(backoff_s))

    async def _next_route(self) -> Pair | Alone:
        give_up_s = self._now() + self._rules.worker_wait_s
        while True:
            prefills, decodes = None if self._is_local() else self._workers.prefills(), self._workers.decodes()
            route = self._choose(prefills, decodes)
            error: NoWorkerError | OverloadedError
            if route is None:
                until_s, error = give_up_s, NoWorkerError(missing(prefills, decodes, self._need))
                if until_s <= self._now():
                    raise error
            else:
                busy = [self._overloads[w.key] for w in route.workers if w.key in self._overloads]
                if not any(until_s > self._now() for until_s, _ in busy):
                    return route
                until_s, error = max(busy, key=lambda entry: entry[0])
                if until_s - self._now() > self._remaining_s(error):
                    raise error
            with self._metrics.queued_requests.track_inprogress():
                await self._workers.wait_for_change(min(until_s - self._now(), self._remaining_s(error)))

    def _choose(self, prefills: Sequence[Worker] | None, decodes: Sequence[Worker]) -> Pair | Alone | None:
        if prefills is None:
            return choose_alone(decodes, self._need, self._in_flight, self._failed)
        return choose(prefills, decodes, self._need, self._in_flight, self._failed)

    def _is_local(self) -> bool:
        """Whether the decode worker is to compute what there is so far."""
        limit = self._rules.local_prefill_tokens_max
        return limit < 0 or self._transcript.position <= limit

    def _remaining_s(self, error: ZipserveError) -> float:
        """Seconds left; when none are, raises what they were waited for."""
        try:
            return self._deadline.remaining_s()
        except DeadlineError:
            raise error from None

    async def _attempt(self, route: Pair | Alone) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        self._in_flight.picked(route)
        with self._in_flight.decoding(route.decode):
            timeout_s = self._deadline.remaining_s()
            attempt = self._over(route) if isinstance(route, Pair) else self._decode(route, None, timeout_s)
            async with aclosing(attempt) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _over(self, pair: Pair) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        """From the prefill worker over to the decode worker."""
        prefill, token_ids = pair.prefill, self._transcript.sequence
        with self._in_flight.prefilling(prefill, len(token_ids)):
            answer = await self._prefill(prefill, token_ids)
        handed_over = False
        try:
            if answer.prompt_logprobs:
                yield PromptLogprobs(logprobs=answer.prompt_logprobs)
            own = [answer.logprobs] if answer.HasField("logprobs") else []
            yield self._append(len(token_ids), [answer.token_id], own)
            if self._transcript.finish is None:
                timeout_s = self._deadline.remaining_s()
                handed_over = True
                async with aclosing(self._decode(pair, answer, timeout_s)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            if not handed_over:
                self._workers.release(prefill, answer.handle, self._job.request_id)

    async def _prefill(self, worker: Worker, token_ids: list[int]) -> PrefillResponse:
        self._called = worker
        self.report.prefill_worker = worker.worker_id
        request = PrefillRequest(
            request_id=self._job.request_id,
            token_ids=token_ids,
            sampling=self._sampling().to_proto(),
            layout_fingerprint=worker.writable_layout,
            priority=self._job.priority,
            prompt_tokens=len(self._job.prompt),
            min_tokens=self._job.min_tokens,
            stop_token_ids=sorted(self._job.stop_token_ids),
        )
        answer = await self._workers.prefill(worker, request, self._deadline.remaining_s())
        self.report.count_prefill(answer)
        return answer

    def _sampling(self) -> Sampling:
        """As asked for; but the prompt's log-probabilities have come with the first token, if there is one."""
        sampling = self._job.sampling
        return replace(sampling, prompt_logprobs=None) if self._transcript.token_ids else sampling

    async def _decode(
        self, route: Pair | Alone, answer: PrefillResponse | None, timeout_s: float
    ) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        """Goes on from what was prefilled, or without an answer lets the decode worker compute the prompt as well."""
        self._called = worker = route.decode
        self.report.decode_worker = worker.worker_id
        kv_tokens = self._transcript.position - 1
        request = DecodeRequest(
            request_id=self._job.request_id,
            sampling=(self._job.sampling if answer else self._sampling()).to_proto(),
            max_new_tokens=self._transcript.remaining,
            stop_token_ids=sorted(self._job.stop_token_ids),
            priority=self._job.priority,
            prompt_tokens=len(self._job.prompt),
            min_tokens=self._job.min_tokens,
        )
        if answer is None:
            self.report.prefill_worker = worker.worker_id
            request.prompt_token_ids.extend(self._transcript.sequence)
        else:
            request.handle.CopyFrom(answer.handle)
            request.token_id = answer.token_id
            request.past_token_ids.extend(self._transcript.sequence[:kv_tokens] if self._job.sampling.penalizes else ())
        pulled = False
        try:
            async with aclosing(self._workers.decode(worker, request, timeout_s)) as events:
                async for event in events:
                    if event.HasField("pulled"):
                        pulled = True
                        self.report.count_pull(event.pulled, kv_tokens)
                        continue
                    if event.HasField("computed"):
                        self.report.count_computed(event.computed)
                        if event.computed.prompt_logprobs:
                            yield PromptLogprobs(logprobs=event.computed.prompt_logprobs)
                        continue
                    if chunk := self._take(event, worker):
                        yield chunk
                    if self._transcript.finish is not None:
                        await self._settle(events)
                        return
            raise WorkerLostError(f"decode worker {worker.worker_id} ended its stream before the sequence ended")
        except WorkerLostError:
            if isinstance(route, Pair) and answer and not pulled:  # it may never have seen the call
                self._workers.release(route.prefill, answer.handle, self._job.request_id)
            raise

    def _take(self, event: DecodeResponse, worker: Worker) -> Chunk | None:
        if event.HasField("tokens"):
            return self._append(event.tokens.position, event.tokens.token_ids, event.tokens.logprobs)
        if event.HasField("finished"):
            if event.finished.reason == FinishReason.FINISH_REASON_UNSPECIFIED:
                raise InternalError(f"decode worker {worker.worker_id} ended a sequence without a reason")
            return self._transcript.end(event.finished.reason)
        return None

    async def _settle(self, events: AsyncGenerator[DecodeResponse, None]) -> None:
        """Lets a worker that knows itself that this was the last token say so, instead of being cancelled."""
        if self._transcript.stop_string is None:
            with suppress(ZipserveError, TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    async for _ in events:
                        pass

    def _append(self, position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Chunk:
        chunk = self._transcript.append(position, token_ids, logprobs)
        if chunk.token_ids:
            self.report.last_token_at_s = self._now()
            if self.report.first_token_at_s is None:
                self.report.first_token_at_s = self.report.last_token_at_s
        return chunk

    def _note_failure(self, error: ZipserveError, route: Pair | Alone) -> None:
        """Learns from a failed attempt; raises the error again when a replay cannot help or none is left."""
        worker = self._called
        assert worker is not None
        if isinstance(error, WorkerLostError):
            self._workers.report_lost(worker)
        self._failures += 1
        if not error.replayable or self._failures >= self._rules.attempts_max:
            raise error
        # a handoff has two ends, and the one that complains need not be the broken one
        blamed = route.workers if isinstance(error, HandoffError) else (worker,)
        self._failed.update(w.key for w in blamed)
        if isinstance(error, OverloadedError):
            self._overloads[worker.key] = self._now() + error.retry_after_s, error
        self.report.replays += 1
        self._metrics.replays.labels(error.reason).inc()
        _log.warning(
            "request.replayed",
            reason=error.reason,
            error=error.message,
            peer=worker.worker_id,
            tokens=len(self._transcript.token_ids),
            failures=self._failures,
        )
