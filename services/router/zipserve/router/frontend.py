"""A request from arrival to its last event: check, admit, run, report.

Every wait lies within the request's deadline, a wait for the client to read included.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from zipserve.common import tracing
from zipserve.common.errors import (
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    SlowReaderError,
    ZipserveError,
)
from zipserve.common.guide import Guide
from zipserve.common.kv.holders import Holders
from zipserve.common.metrics import Metrics
from zipserve.common.models import ModelFiles
from zipserve.common.rpc.channel import Deadline
from zipserve.common.sampling import Sampling
from zipserve.router.admission import Admission, Ticket
from zipserve.router.caller import ANYBODY, Caller
from zipserve.router.calls import Workers
from zipserve.router.choice import Choice, Report, job_of
from zipserve.router.config import RouterSettings
from zipserve.router.facts import ModelFacts
from zipserve.router.guides import GuideCheck
from zipserve.router.job import (
    Job,
    check_cache_salt,
    check_ids,
    check_min_tokens,
    check_prompt,
    check_prompt_logprobs,
    check_stop,
    choices_of,
    completion_tokens,
)
from zipserve.router.merge import merge
from zipserve.router.observation import Observation
from zipserve.router.policy import InFlight, Need
from zipserve.router.prefixes import Prefixes
from zipserve.router.session import Rules, Session
from zipserve.router.tokenizer import PromptTokenizer
from zipserve.router.transcript import Chunk, Transcript
from zipserve.v1.inference_service_pb2 import GenerateRequest, Model, PromptLogprobs, TokenizeRequest
from zipserve.v1.sampling_pb2 import FinishReason


@dataclass(frozen=True)
class Started:
    """The request was admitted."""

    job: Job
    model: str


@dataclass(frozen=True)
class Finished:
    """A choice ended. Times in seconds."""

    reason: FinishReason.ValueType
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    decode_s: float
    report: Report
    choice: int = 0
    stop_string: str = ""
    """The stop string that ended it, if one did."""


Event = Started | PromptLogprobs | Chunk | Finished


class Frontend:
    """Serves requests for one model."""

    def __init__(
        self,
        settings: RouterSettings,
        model: ModelFiles,
        facts: ModelFacts,
        tokenizer: PromptTokenizer,
        guides: GuideCheck,
        workers: Workers,
        holders: Holders,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.draining = False
        self._settings = settings
        self._own_facts = facts
        self._tokenizer = tokenizer
        self._guides = guides
        self._workers = workers
        self._metrics = metrics
        self._now = now
        self._admission = Admission(settings.requests_max, settings.queue_tokens_max)
        self._in_flight = InFlight()
        self._prefixes = Prefixes(settings.prefix_names_max, holders, settings.fetch_cost)
        self._rules = Rules(settings.worker_wait_s, settings.attempts_max, settings.local_prefill_tokens_max)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def requests(self) -> int:
        """Requests in flight."""
        return self._admission.requests

    async def idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    def facts(self) -> ModelFacts:
        """Limits of the model: what the workers say, or its own files while none is up."""
        own = self._own_facts
        context_tokens, eos = own.context_tokens, own.eos_token_ids
        for workers in (self._workers.prefills(), self._workers.decodes()):
            same = [w for w in workers if (w.model, w.revision) == (self.model.name, self.model.revision)]
            if same:
                longest = max(same, key=lambda w: w.context_tokens)
                context_tokens = min(context_tokens, longest.context_tokens)
                eos = longest.eos_token_ids or eos
        return replace(own, context_tokens=context_tokens, eos_token_ids=eos)

    def deadline(self, asked_s: float | None) -> Deadline:
        """The deadline of a request whose client gives it so many seconds; None: it says nothing."""
        settings = self._settings
        return Deadline(min(settings.deadline_default_s if asked_s is None else asked_s, settings.deadline_max_s))

    def served(self, model: str = "") -> Model:
        """A model as clients are told of it; empty: the only one.

        Raises:
            ModelNotFoundError: it is not served.
        """
        self._check_model(model)
        facts = self.facts()
        return Model(
            id=self.model.name,
            revision=self.model.revision,
            context_tokens=facts.context_tokens,
            vocab_tokens=facts.vocab_tokens,
            completion_tokens_max=self._settings.completion_tokens_max,
            chat=self._tokenizer.chat,
            tools=self._tokenizer.tools,
        )

    async def tokenize(self, request: TokenizeRequest, deadline: Deadline, caller: Caller = ANYBODY) -> list[int]:
        """Token ids of a prompt, as `generate` would compute it.

        Raises:
            ZipserveError: it cannot be tokenized.
        """
        self._check_model(request.model)
        with self._place(caller):
            async with asyncio.timeout(deadline.remaining_s()):
                return await self._encode(request)

    async def detokenize(
        self, model: str, token_ids: Sequence[int], deadline: Deadline, caller: Caller = ANYBODY
    ) -> str:
        """Text of token ids, without special tokens.

        Raises:
            InvalidRequestError: an id lies outside the vocabulary.
            ZipserveError: they cannot be read.
        """
        self._check_model(model)
        with self._place(caller):
            check_ids(token_ids, self.facts(), "token_ids")
            async with asyncio.timeout(deadline.remaining_s()):
                return await self._tokenizer.decode_all(token_ids)

    async def generate(
        self, request: GenerateRequest, request_id: str, deadline: Deadline, caller: Caller = ANYBODY, api: str = "grpc"
    ) -> AsyncGenerator[Event, None]:
        """Answers a request. Closing the generator cancels everything behind it. Who does not ask for the next event in
        time is cancelled where it waits, and gets the error when it closes the generator, which it therefore must do.

        Args:
            api: through which it came, for the log: grpc or http.

        Raises:
            SlowReaderError: an event was not taken for `slow_reader_s`.
            ZipserveError: it cannot be answered.
        """
        guide = request.guide.WhichOneof("kind") or ""
        trace = Observation(request_id, self.model.name, self._now(), caller, api, guide)
        try:
            async with aclosing(self._generate(request, request_id, deadline, trace)) as events:
                while (event := await _next(events, deadline)) is not None:
                    reading = asyncio.timeout(deadline.remaining_s(self._settings.slow_reader_s))
                    try:
                        async with reading:
                            yield event
                    finally:
                        # Here, and not in an except: that the reader's time is over shows as GeneratorExit.
                        if reading.expired():
                            self._raise_slow(deadline)
        except ZipserveError as error:
            trace.error = error
            raise
        except Exception as error:
            late = isinstance(error, TimeoutError)
            trace.error = DeadlineError("the deadline has passed") if late else InternalError(repr(error))
            raise
        finally:
            trace.finish(self._now(), self._metrics)

    async def _generate(
        self, request: GenerateRequest, request_id: str, deadline: Deadline, trace: Observation
    ) -> AsyncGenerator[Event, None]:
        with self._place(trace.caller) as ticket, self._metrics.running_requests.track_inprogress():
            job = await self._check(request, request_id, ticket, trace.caller)
            trace.admit(job, self._now(), self._metrics)
            yield Started(job, self.model.name)
            async with aclosing(self._run(job, deadline, trace)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _place(self, caller: Caller) -> Iterator[Ticket]:
        if self.draining:
            raise DrainingError("this router is going away and takes no new requests")
        ticket = self._admission.enter(self._now(), caller)
        self._idle.clear()
        try:
            yield ticket
        finally:
            self._admission.leave(ticket, self._now())
            if not self._admission.requests:
                self._idle.set()

    def _raise_slow(self, deadline: Deadline) -> None:
        deadline.remaining_s()
        raise SlowReaderError(
            f"the client has read nothing for {self._settings.slow_reader_s:g} s, though there was more for it; "
            "the request was cancelled"
        )

    def _check_model(self, model: str) -> None:
        if model not in ("", self.model.name):
            raise ModelNotFoundError(f"model {model[:128]!r} is not served; served: {self.model.name}")

    async def _check(self, request: GenerateRequest, request_id: str, ticket: Ticket, caller: Caller) -> Job:
        self._check_model(request.model)
        n = choices_of(request.n)
        facts = self.facts()
        sampling = Sampling.from_proto(request.sampling, default_seed=secrets.randbits(64))
        sampling.check_ids(facts.vocab_tokens)
        check_stop(request.stop, facts, self._settings)
        check_cache_salt(request.cache_salt)
        guide = Guide.of(request)
        if guide is not None:
            await self._guides.check(guide)
        with tracing.span("tokenize") as span:
            prompt = await self._encode(request)
            span.set_attribute("zipserve.prompt_tokens", len(prompt))
        check_prompt(prompt, facts, self._settings.prompt_tokens_max)
        check_prompt_logprobs(len(prompt), sampling)
        max_tokens = completion_tokens(request.stop, len(prompt), facts, self._settings)
        check_min_tokens(request.stop, max_tokens)
        eos = frozenset[int]() if request.stop.ignore_eos else facts.eos_token_ids
        job = Job(
            request_id=request_id,
            prompt=tuple(prompt),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=tuple(request.stop.stop),
            stop_token_ids=eos.union(request.stop.stop_token_ids),
            priority=caller.priority(request.priority),
            min_tokens=request.stop.min_tokens,
            cache_salt=caller.salt(request.cache_salt),
            guide=guide,
            n=n,
        )
        self._admission.reserve(ticket, len(prompt) + n * max_tokens, self._now())
        return job

    async def _encode(self, request: GenerateRequest | TokenizeRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                return await self._tokenizer.encode_text(request.text)
            case "chat":
                return await self._tokenizer.encode_chat(request.chat)
            case "token_ids" if isinstance(request, GenerateRequest):
                return list(request.token_ids.ids)
            case _:
                kinds = " or ".join(field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields)
                raise InvalidRequestError(f"there is no prompt: set {kinds}", field="prompt")

    async def _run(
        self, job: Job, deadline: Deadline, trace: Observation
    ) -> AsyncGenerator[PromptLogprobs | Chunk | Finished, None]:
        for index in range(job.n):
            own = job_of(job, index)
            trace.choices.append(Choice(own, Transcript(own, self._tokenizer.detokenizer())))
        session = Session(
            choices=trace.choices,
            need=Need(self.model.name, self.model.revision, job.tokens_max),
            workers=self._workers,
            in_flight=self._in_flight,
            prefixes=self._prefixes,
            deadline=deadline,
            rules=self._rules,
            metrics=self._metrics,
            now=self._now,
            parent=trace.span,
        )
        async with aclosing(_run_parting(session)) as chunks:
            async for chunk in chunks:
                trace.note_token(self._now(), self._metrics)
                if chunk:
                    yield chunk
                if isinstance(chunk, Chunk) and chunk.ends:
                    yield _finished(trace.choices[chunk.choice], trace.arrived_s)
        trace.complete = True


async def _next(events: AsyncGenerator[Event, None], deadline: Deadline) -> Event | None:
    """The next event; None when there are no more."""
    limit = asyncio.timeout(deadline.remaining_s())
    try:
        async with limit:
            return await anext(events, None)
    except TimeoutError as error:
        if limit.expired():
            raise DeadlineError("the deadline has passed") from error
        raise


async def _run_parting(session: Session) -> AsyncGenerator[PromptLogprobs | Chunk, None]:
    """Runs a session, and those of the choices that part when it fails."""
    async with aclosing(session.run()) as chunks:
        async for chunk in chunks:
            yield chunk
    async with aclosing(merge([parted.run() for parted in session.parted()])) as chunks:
        async for chunk in chunks:
            yield chunk


def _finished(choice: Choice, arrived_s: float) -> Finished:
    transcript, report = choice.transcript, choice.report
    assert transcript.finish is not None
    first_s, last_s = report.first_token_at_s or arrived_s, report.last_token_at_s or arrived_s
    return Finished(
        reason=transcript.finish,
        prompt_tokens=len(choice.job.prompt),
        completion_tokens=len(transcript.token_ids),
        first_token_s=first_s - arrived_s,
        decode_s=last_s - first_s,
        report=report,
        choice=choice.job.choice,
        stop_string=transcript.stop_string or "",
    )
