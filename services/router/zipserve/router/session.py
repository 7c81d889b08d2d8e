"""One request's way over the workers: pick a pair, prefill, decode, and again from the emitted tokens when one fails.

What the client has seen is in the transcripts; a replay prefills prompt and transcript and goes on behind it. Several
choices of one prompt share a prefill and a decode; what is left of them after a failure goes ways of its own. Knows no
gRPC: workers are reached through the `Workers` interface.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from opentelemetry.trace import Span

from zipserve.common import log, tracing
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
from zipserve.common.sampling import Sampling
from zipserve.router.calls import Workers, decode_request, prefill_request
from zipserve.router.choice import Choice
from zipserve.router.policy import (
    Alone,
    InFlight,
    Need,
    Pair,
    Worker,
    WorkerKey,
    choose,
    choose_alone,
    first_token_s_at_least,
    missing,
    prefill_scores,
)
from zipserve.router.prefixes import Prefixes
from zipserve.router.transcript import Chunk
from zipserve.v1.decode_service_pb2 import DecodedTokens, DecodeResponse, EndSequenceRequest
from zipserve.v1.inference_service_pb2 import PromptLogprobs
from zipserve.v1.prefill_service_pb2 import FirstToken, PrefillResponse
from zipserve.v1.sampling_pb2 import FinishReason, TokenLogprobs

_log = log.get()

_BACKOFF_MAX_S = 1.0
_STREAM_ID_BYTES = 16
_SETTLE_S = 1.0
"""How long the end of a stream is waited for after its last token is known."""


@dataclass(frozen=True)
class Rules:
    """How patient a session is."""

    worker_wait_s: float
    attempts_max: int
    local_prefill_tokens_max: int = 0
    """Longest sequence that is computed on the decode worker; 0: none, -1: any."""
    backoff_s: float = 0.02
    """Pause after the first failed attempt; doubles with every further one."""


class Session:
    """The run of choices that share their tokens so far: those of a new prompt, or one that may have tokens."""

    def __init__(
        self,
        choices: Sequence[Choice],
        need: Need,
        workers: Workers,
        in_flight: InFlight,
        prefixes: Prefixes,
        deadline: Deadline,
        rules: Rules,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
        failed: Collection[WorkerKey] = (),
        parent: Span = tracing.NONE,
    ) -> None:
        self._choices = choices
        self._job = choices[0].job
        self._need = need
        self._workers = workers
        self._in_flight = in_flight
        self._prefixes = prefixes
        self._deadline = deadline
        self._rules = rules
        self._metrics = metrics
        self._now = now
        self._failed = set(failed)
        self._parent = parent
        """Span of the request."""
        self._span = parent
        """Of the attempt."""
        self._overloads: dict[WorkerKey, tuple[float, OverloadedError]] = {}
        """Until when a worker wants to be left alone, and its words."""
        self._failures = 0
        """Attempts in a row that got no further than the prompt."""
        self._called: Worker | None = None
        """Who was called last."""
        self._stream_id = b""
        """Names the last call of several choices."""
        self._to_compute: dict[WorkerKey, int] = {}
        """Tokens that each prefill worker would have to compute for the route that was picked last."""
        self._told_prompt = False
        """Whether the client has the prompt's log-probabilities."""

    async def run(self) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        """Generates until the transcripts have ended, or are to go on one by one: see `parted`. Closing it cancels what
        runs and gives up what is held.

        Raises:
            NoWorkerError: no pair of workers could serve this in time.
            ZipserveError: an error that a replay cannot help, or the last one when all attempts failed.
        """
        while self._unfinished() and not self.parted():
            route = await self._next_route()
            tokens_before = self._tokens
            try:
                with tracing.lasting("attempt", self._parent) as self._span:
                    async with aclosing(self._attempt(route)) as chunks:
                        async for chunk in chunks:
                            yield chunk
            except ZipserveError as error:
                # a first token proves nothing: with a broken handoff every prefill would still yield one
                if self._tokens - tokens_before > len(self._choices):
                    self._failures = 0
                self._note_failure(error, route)
                backoff_s = min(self._rules.backoff_s * 2 ** (self._failures - 1), _BACKOFF_MAX_S)
                await asyncio.sleep(self._deadline.remaining_s(backoff_s))

    def parted(self) -> list["Session"]:
        """A session for each unfinished choice of several, once they have tokens of their own to be replayed, or where
        there is no prefill worker to share.
        """
        if len(self._choices) == 1 or not (self._tokens or self._is_local()):
            return []
        where = (self._need, self._workers, self._in_flight, self._prefixes)
        how = (self._deadline, self._rules, self._metrics, self._now)
        return [Session([choice], *where, *how, self._failed, self._parent) for choice in self._unfinished()]

    @property
    def _tokens(self) -> int:
        """Generated so far by all choices."""
        return sum(len(choice.transcript.token_ids) for choice in self._choices)

    def _unfinished(self) -> list[Choice]:
        return [choice for choice in self._choices if choice.transcript.finish is None]

    async def _next_route(self) -> Pair | Alone:
        """Waits for workers that can serve this."""
        asked_s = self._now()
        try:
            with tracing.using(self._parent), tracing.span("route"):
                return await self._wait_for_route()
        finally:
            waited_s = self._now() - asked_s
            self._metrics.queue_seconds.observe(waited_s)
            for choice in self._choices:
                choice.report.route_s += waited_s

    async def _wait_for_route(self) -> Pair | Alone:
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
                    self._check_hope(prefills or ())
                    return route
                until_s, error = max(busy, key=lambda entry: entry[0])
                if until_s - self._now() > self._remaining_s(error):
                    raise error
            with self._metrics.queued_requests.track_inprogress():
                await self._workers.wait_for_change(min(until_s - self._now(), self._remaining_s(error)))

    def _check_hope(self, prefills: Sequence[Worker]) -> None:
        """Raises DeadlineError if no prefill worker can have the first token in time."""
        left_s, priority = self._deadline.remaining_s(), self._job.priority
        takes_s = first_token_s_at_least(prefills, self._need, self._in_flight, priority, self._to_compute)
        if takes_s >= left_s:
            raise DeadlineError(f"the first token takes {takes_s:.2f} s at least, the deadline is in {left_s:.2f} s")

    def _choose(self, prefills: Sequence[Worker] | None, decodes: Sequence[Worker]) -> Pair | Alone | None:
        token_ids = self._choices[0].transcript.sequence
        if prefills is None:
            to_compute = self._prefixes.to_compute(decodes, token_ids, self._job.cache_salt)
            return choose_alone(decodes, self._need, self._in_flight, self._failed, to_compute)
        self._to_compute = self._prefixes.to_compute(prefills, token_ids, self._job.cache_salt)
        pair = choose(prefills, decodes, self._need, self._in_flight, self._failed, self._to_compute)
        if pair is not None:
            scores = prefill_scores(prefills, self._in_flight, self._failed, self._to_compute)
            route = {
                "prefill_worker": pair.prefill.worker_id,
                "decode_worker": pair.decode.worker_id,
                "scores": [score._asdict() for score in scores],
            }
            _log.debug("route.scored", **route)
            tracing.annotate("zipserve.route", lambda: json.dumps(route))
        return pair

    def _is_local(self) -> bool:
        """Whether the decode worker is to compute what there is so far."""
        limit = self._rules.local_prefill_tokens_max
        return limit < 0 or self._choices[0].transcript.position <= limit

    def _remaining_s(self, error: ZipserveError) -> float:
        """Seconds left; when none are, raises what they were waited for."""
        try:
            return self._deadline.remaining_s()
        except DeadlineError:
            raise error from None

    async def _attempt(self, route: Pair | Alone) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        self._in_flight.picked(route)
        with self._in_flight.decoding(route.decode, len(self._choices)):
            timeout_s = self._deadline.remaining_s()
            attempt = self._over(route) if isinstance(route, Pair) else self._decode(route, None, timeout_s)
            async with aclosing(attempt) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _over(self, pair: Pair) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        """From the prefill worker over to the decode worker."""
        prefill, token_ids = pair.prefill, self._choices[0].transcript.sequence
        self._prefixes.note(prefill, token_ids, self._job.cache_salt)
        tokens = self._to_compute.get(prefill.key, len(token_ids))
        with self._in_flight.prefilling(prefill, tokens, self._job.priority):
            answer = await self._prefill(prefill)
        handed_over = False
        try:
            if len(answer.other_choices) != len(self._choices) - 1:
                raise InternalError(
                    f"prefill worker {prefill.worker_id} drew {1 + len(answer.other_choices)} first tokens, not "
                    f"{len(self._choices)}"
                )
            for told in self._tell_prompt(answer.prompt_logprobs):
                yield told
            own = FirstToken(
                token_id=answer.token_id,
                logprobs=answer.logprobs if answer.HasField("logprobs") else None,
                complete=answer.complete,
            )
            for choice, first in zip(self._choices, [own, *answer.other_choices], strict=True):
                logprobs = [first.logprobs] if first.HasField("logprobs") else []
                made = DecodedTokens(
                    position=len(token_ids), token_ids=[first.token_id], logprobs=logprobs, complete=first.complete
                )
                yield self._append(choice, made)
            if self._unfinished():
                timeout_s = self._deadline.remaining_s()
                handed_over = True
                async with aclosing(self._decode(pair, answer, timeout_s)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            if not handed_over:
                self._workers.release(prefill, answer.handle, self._job.request_id)

    async def _prefill(self, worker: Worker) -> PrefillResponse:
        self._called = worker
        for choice in self._choices:
            choice.report.prefill_worker = worker.worker_id
        request = prefill_request(self._choices, worker, self._sampling())
        with tracing.using(self._span):
            answer = await self._workers.prefill(worker, request, self._deadline.remaining_s())
        for choice in self._choices:
            choice.report.count_prefill(answer, len(self._job.prompt))
        return answer

    def _sampling(self) -> Sampling:
        """As asked for; but the prompt's log-probabilities come once, with the first token of the first choice."""
        sampling, told = self._job.sampling, self._told_prompt or self._tokens or self._job.choice
        return replace(sampling, prompt_logprobs=None) if told else sampling

    async def _decode(
        self, route: Pair | Alone, answer: PrefillResponse | None, timeout_s: float
    ) -> AsyncGenerator[Chunk | PromptLogprobs, None]:
        """Goes on from what was prefilled, or without an answer lets the decode worker compute the prompt as well."""
        self._called = worker = route.decode
        choices = self._unfinished()
        for choice in choices:
            choice.report.decode_worker = worker.worker_id
        if answer is None:
            choices[0].report.prefill_worker = worker.worker_id
        self._stream_id = secrets.token_bytes(_STREAM_ID_BYTES) if answer else b""
        sampling = choices[0].job.sampling if answer else self._sampling()
        request = decode_request(choices, answer, sampling, self._stream_id)
        pulled = False
        try:
            with tracing.using(self._span):
                stream = self._workers.decode(worker, request, timeout_s)
            async with aclosing(stream) as events:
                async for event in events:
                    pulled |= event.HasField("pulled")
                    for chunk in self._take(event, choices, worker):
                        yield chunk
                    if not self._unfinished():
                        await self._settle(events)
                        return
            raise WorkerLostError(f"decode worker {worker.worker_id} ended its stream before the sequence ended")
        finally:
            if isinstance(route, Pair) and answer and not pulled:  # it may never have seen the call, or refused it
                self._workers.release(route.prefill, answer.handle, self._job.request_id)

    def _take(self, event: DecodeResponse, choices: list[Choice], worker: Worker) -> Iterator[Chunk | PromptLogprobs]:
        match event.WhichOneof("event"):
            case "pulled":
                for choice in choices:
                    choice.report.count_pull(event.pulled, choice.transcript.position - 1)
            case "computed":
                choices[0].report.count_computed(event.computed, len(self._job.prompt))
                yield from self._tell_prompt(event.computed.prompt_logprobs)
            case "tokens" | "finished" as kind:
                yield from self._take_of_one(kind, event, choices, worker)

    def _tell_prompt(self, logprobs: Sequence[TokenLogprobs]) -> Iterator[PromptLogprobs]:
        """The prompt's log-probabilities for the client, once: an attempt may fail between them and the first token."""
        if logprobs and not self._told_prompt:
            self._told_prompt = True
            yield PromptLogprobs(logprobs=logprobs)

    def _take_of_one(self, kind: str, event: DecodeResponse, choices: list[Choice], worker: Worker) -> Iterator[Chunk]:
        number = event.tokens.sequence if kind == "tokens" else event.finished.sequence
        if number >= len(choices):
            raise InternalError(f"decode worker {worker.worker_id} has sent sequence {number} of {len(choices)}")
        choice = choices[number]
        if choice.transcript.finish is not None:  # by a stop string, which workers know nothing of
            return
        if kind == "tokens":
            chunk = self._append(choice, event.tokens)
            if choice.transcript.stop_string is not None and self._unfinished():
                ended = EndSequenceRequest(stream_id=self._stream_id, sequence=number)
                self._workers.end_sequence(worker, ended, self._job.request_id)
        elif event.finished.reason == FinishReason.FINISH_REASON_UNSPECIFIED:
            raise InternalError(f"decode worker {worker.worker_id} ended a sequence without a reason")
        else:
            chunk = choice.transcript.end(event.finished.reason)
        if chunk or chunk.ends:
            yield chunk

    async def _settle(self, events: AsyncGenerator[DecodeResponse, None]) -> None:
        """Lets a worker that knows itself that this was the last token say so, instead of being cancelled."""
        if all(choice.transcript.stop_string is None for choice in self._choices):
            with suppress(ZipserveError, TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    async for _ in events:
                        pass

    def _append(self, choice: Choice, made: DecodedTokens) -> Chunk:
        chunk = choice.transcript.append(made.position, made.token_ids, made.logprobs, complete=made.complete)
        if chunk.token_ids:
            gap_s = choice.report.count_tokens(len(chunk.token_ids), self._now())
            if gap_s is not None:
                self._metrics.inter_token_seconds.observe(gap_s)
            for _ in chunk.token_ids[1:]:  # they came at the same time as the one before
                self._metrics.inter_token_seconds.observe(0.0)
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
        for choice in self._unfinished():
            choice.report.replays += 1
            choice.report.replay_reasons[error.reason] += 1
        self._metrics.replays.labels(error.reason).inc()
        _log.warning(
            "request.replayed",
            reason=error.reason,
            error=error.message,
            peer=worker.worker_id,
            tokens=self._tokens,
            failures=self._failures,
        )
