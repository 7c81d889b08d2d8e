"""Computes prompts step by step on the device and hands their KV over under leases."""

import asyncio
import time
from dataclasses import dataclass, field

from zipserve.common import log
from zipserve.common.errors import DeadlineError, DrainingError, KvValueError, UnavailableError, ZipserveError
from zipserve.common.kv import header, prefix
from zipserve.common.kv.header import SlabIdentity
from zipserve.common.kv.layout import HEADER_BYTES
from zipserve.common.kv.pools import Slabs
from zipserve.common.metrics import Metrics
from zipserve.common.transfer.source import KvSource
from zipserve.engine.device import Device
from zipserve.engine.logprobs import prompt_logprobs
from zipserve.engine.sampling import Drawn, Sampler, draw
from zipserve.engine.sequence import Segment, Sequence
from zipserve.prefill.scheduler import Chunk, Job, PrefillScheduler
from zipserve.v1 import kv_pb2
from zipserve.v1.sampling_pb2 import TokenLogprobs

_log = log.get()


@dataclass(frozen=True)
class Prefilled:
    """A computed prompt."""

    drawn: list[Drawn]
    """The token after it, of each choice."""
    prompt_logprobs: list[TokenLogprobs]
    """Of its tokens but the first, if they were asked for."""
    handle: kv_pb2.KvHandle
    queue_s: float
    compute_s: float


@dataclass
class Prompt:
    """What is to be computed, and the future that its caller awaits."""

    request_id: str
    token_ids: list[int]
    samplers: list[Sampler]
    """Of each choice."""
    submitted_s: float
    result: "asyncio.Future[Prefilled]"
    started_s: float = 0.0
    """When its first step began."""
    sequence: Sequence | None = None
    """From then on."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens computed so far but the first, and of the next one, if they are asked for."""


@dataclass(frozen=True)
class _Computed:
    drawn: list[Drawn]
    refs: list[kv_pb2.BlockRef]


_Outcome = _Computed | ZipserveError | None
"""Of one chunk of a step; None: it went well, and was not the last of its prompt."""


class PrefillWorker:
    """The queue, the steps and the slabs of one prefill worker. Lives in the event loop; `_compute` does not."""

    def __init__(self, device: Device, scheduler: PrefillScheduler[Prompt], source: KvSource, metrics: Metrics) -> None:
        self._device = device
        self._scheduler = scheduler
        self._source = source
        self._metrics = metrics
        self._stepping: list[Job[Prompt]] = []
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def prefill(
        self, request_id: str, token_ids: list[int], samplers: list[Sampler], deadline_s: float, priority: int = 0
    ) -> Prefilled:
        """Computes a prompt when its turn comes. Cancelling frees all that it holds before the next step.

        Args:
            samplers: of each choice that is wanted; at least one.
            deadline_s: on time.monotonic()'s clock.
            priority: higher goes first.

        Raises:
            DrainingError, OverloadedError, InvalidRequestError: it was not accepted.
            DeadlineError: it was not computed in time, or certainly would not be.
            UnavailableError: computing it failed.
        """
        if self.draining:
            raise DrainingError("this prefill worker is going away")
        result: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        now_s = time.monotonic()
        job = Job(len(token_ids), deadline_s, Prompt(request_id, token_ids, samplers, now_s, result), priority)
        self._scheduler.submit(job, now_s)
        self._note_levels()
        self._idle.clear()
        self._work.set()
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                return await result
        except TimeoutError as error:
            self._abandon(job)
            raise DeadlineError("the deadline passed before the prompt was computed") from error
        except asyncio.CancelledError:
            self._abandon(job)
            raise

    def _abandon(self, job: Job[Prompt]) -> None:
        """Nobody waits for the result any more."""
        result = job.payload.result
        if result.done() and not result.cancelled() and result.exception() is None:
            self._source.release_handle(result.result().handle)  # it was computed, but nobody took it
        elif job not in self._stepping:
            self._drop(job)

    def _drop(self, job: Job[Prompt]) -> None:
        """Takes a job out that is not in a step, and frees what it holds."""
        self._scheduler.remove(job)
        self.free(job.slabs)
        self._note_idle()

    def free(self, slabs: Slabs) -> None:
        """Takes slabs back; poisoned first, so that a late reader notices."""
        for kind, slab in slabs:
            header.poison(self._device.slab_view(kind, slab))
        self._scheduler.pools.give_back(slabs)
        self._note_levels()
        self._work.set()

    async def drained(self) -> None:
        """Returns when no prompt is left and every handle was pulled or given up."""
        await self._idle.wait()
        await self._source.no_leases()

    async def run(self) -> None:
        """Computes step after step, for ever."""
        while True:
            await self._work.wait()
            self._work.clear()
            step = self._scheduler.next_step(time.monotonic())
            for job in step.late:
                _fail(job.payload, DeadlineError("the deadline is too near for what is left of the prompt"))
                self._drop(job)
            if step.chunks:
                await self._run(step.chunks)
                self._work.set()
            self._note_idle()

    async def _run(self, chunks: list[Chunk[Prompt]]) -> None:
        started_s = time.monotonic()
        self._stepping = [chunk.job for chunk in chunks]
        self._note_levels()
        for job in self._stepping:
            if job.payload.sequence is None:
                job.payload.started_s = started_s
                job.payload.sequence = Sequence(job.slabs.blocks, job.slot, sinks=next(iter(job.slabs.sinks), -1))
        try:
            outcomes = await self._device.run(self._compute, chunks)
        except Exception:  # noqa: BLE001  # one bad step must not end the worker
            _log.exception("step.failed", requests=[job.payload.request_id for job in self._stepping])
            error = UnavailableError("computing the prompt failed; the worker's log has the details")
            outcomes = [error for _ in chunks]
        self._stepping = []
        ended_s = time.monotonic()
        self._metrics.step_seconds.observe(ended_s - started_s)
        self._scheduler.advance(chunks, ended_s - started_s, ended_s)
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            self._finish(chunk.job, outcome, ended_s)

    def _finish(self, job: Job[Prompt], outcome: _Outcome, ended_s: float) -> None:
        prompt = job.payload
        if isinstance(outcome, ZipserveError):
            _fail(prompt, outcome)
        if prompt.result.done():  # it has failed, or nobody waits any more
            self._drop(job)
        elif isinstance(outcome, _Computed):
            handle = self._source.issue(outcome.refs, len(prompt.token_ids), job.slabs)
            self._metrics.prompt_tokens.inc(len(prompt.token_ids))
            queue_s, compute_s = prompt.started_s - prompt.submitted_s, ended_s - prompt.started_s
            prompt.result.set_result(Prefilled(outcome.drawn, prompt.logprobs, handle, queue_s, compute_s))

    def _note_levels(self) -> None:
        scheduler, metrics = self._scheduler, self._metrics
        metrics.queued_requests.set(scheduler.queued_requests)
        metrics.running_requests.set(scheduler.running_requests)
        metrics.free_blocks.set(scheduler.pools.blocks.free)

    def _note_idle(self) -> None:
        self._note_levels()
        if not self._scheduler.queued_requests and not self._scheduler.running_requests:
            self._idle.set()

    # In the device's thread.

    def _compute(self, chunks: list[Chunk[Prompt]]) -> list[_Outcome]:
        prompts = [chunk.job.payload for chunk in chunks]
        step = self._device.engine.forward([_segment(chunk) for chunk in chunks])
        last = [i for i, chunk in enumerate(chunks) if chunk.is_last]
        owners = [i for i in last for _ in prompts[i].samplers]
        samplers = [sampler for i in last for sampler in prompts[i].samplers]
        tokens = draw(step.logits[owners], samplers, [len(prompts[i].token_ids) for i in owners])
        outcomes: list[_Outcome] = [step.failed.get(i) for i in range(len(chunks))]
        for i, rows in step.every.items():
            prompts[i].logprobs += prompt_logprobs(
                rows, prompts[i].token_ids, chunks[i].job.computed, prompts[i].samplers[0].params.prompt_logprobs or 0
            )
        for i in last:
            drawn = [token for token, owner in zip(tokens, owners, strict=True) if owner == i]
            try:
                outcomes[i] = outcomes[i] or _Computed(drawn, self._seal(chunks[i].job))
            except KvValueError as error:
                outcomes[i] = error
        return outcomes

    def _seal(self, job: Job[Prompt]) -> list[kv_pb2.BlockRef]:
        layout, token_ids = self._device.layout, job.payload.token_ids
        hashes = prefix.prefix_hashes(token_ids, layout.block_tokens, layout.fingerprint)
        rest = len(token_ids) % layout.block_tokens
        if rest:
            self._device.cache.pack_tail(job.slot, rest, job.slabs.tails[0])
        refs = []
        parts = layout.slabs_of(len(token_ids))
        for (kind, slab), generation, (_, position, tokens) in zip(job.slabs, job.generations, parts, strict=True):
            identity = SlabIdentity(
                kind=kind,
                fingerprint=layout.fingerprint,
                incarnation=self._device.incarnation,
                generation=generation,
                start_position=position,
                tokens=tokens,
                payload_bytes=layout.payload_bytes(kind, tokens),
                prefix_hash=hashes[position // layout.block_tokens],
            )
            checksum = header.seal(self._device.slab_view(kind, slab), identity)
            refs.append(_ref(identity, slab, checksum))
        return refs


def _segment(chunk: Chunk[Prompt]) -> Segment:
    job, sequence = chunk.job, chunk.job.payload.sequence
    assert sequence is not None
    wants_logprobs = job.payload.samplers[0].params.prompt_logprobs is not None
    return Segment(sequence, job.payload.token_ids[job.computed : job.computed + chunk.tokens], wants_logprobs)


def _ref(identity: SlabIdentity, slab: int, checksum: int) -> kv_pb2.BlockRef:
    return kv_pb2.BlockRef(
        kind=identity.kind.value,  # type: ignore[arg-type]  # our enum has the numbers of the proto
        slab=slab,
        bytes=HEADER_BYTES + identity.payload_bytes,
        generation=identity.generation,
        start_position=identity.start_position,
        tokens=identity.tokens,
        prefix_hash=identity.prefix_hash[: header.SHORT_HASH_BYTES],
        checksum=checksum,
    )


def _fail(prompt: Prompt, error: Exception) -> None:
    if not prompt.result.done():
        prompt.result.set_exception(error)
