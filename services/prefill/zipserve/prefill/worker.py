"""Computes prompts step by step on the device and hands their KV over under leases."""

import asyncio
import time
from dataclasses import dataclass

from zipserve.common import log
from zipserve.common.errors import DeadlineError, DrainingError, KvValueError, UnavailableError, ZipserveError
from zipserve.common.kv.pools import Slabs
from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.common.kv.seals import Seals
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.steps import Step, pairs_of
from zipserve.common.transfer.fetch import PrefixFetcher
from zipserve.common.transfer.source import KvSource
from zipserve.engine.device import Device
from zipserve.engine.logprobs import prompt_logprobs
from zipserve.engine.sampling import Drawn, Sampler, draw
from zipserve.engine.sequence import Segment, Sequence
from zipserve.prefill.observation import observed
from zipserve.prefill.prompt import Prefilled, Prompt
from zipserve.prefill.scheduler import Chunk, Job, PrefillScheduler
from zipserve.prefill.sealing import seal_blocks, seal_tail
from zipserve.v1 import kv_pb2

_log = log.get()


@dataclass(frozen=True)
class _Computed:
    drawn: list[Drawn]
    tail: list[kv_pb2.BlockRef]
    """One, unless the prompt ends with a block."""


_Outcome = _Computed | ZipserveError | None
"""Of one chunk of a step; None: it went well, and was not the last of its prompt."""


class PrefillWorker:
    """The queue, the steps and the slabs of one prefill worker. Lives in the event loop; `_compute` does not."""

    def __init__(
        self,
        device: Device,
        scheduler: PrefillScheduler[Prompt],
        seals: Seals,
        source: KvSource,
        fetcher: PrefixFetcher,
        metrics: Metrics,
    ) -> None:
        self._device = device
        self._scheduler = scheduler
        self._seals = seals
        self._source = source
        self._fetcher = fetcher
        self._metrics = metrics
        self._stepping: list[Job[Prompt]] = []
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        scheduler.pools.on_free = seals.poison

    async def prefill(
        self,
        request_id: str,
        token_ids: list[int],
        samplers: list[Sampler],
        deadline: Deadline,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Prefilled:
        """Computes a prompt when its turn comes. Cancelling frees all that it holds before the next step.

        Args:
            samplers: of each choice that is wanted; at least one.
            priority: higher goes first.
            cache_salt: prompts with other ones share no block with this one.

        Raises:
            DrainingError, OverloadedError, InvalidRequestError: it was not accepted.
            DeadlineError: it was not computed in time, or certainly would not be.
            UnavailableError: computing it failed.
        """
        if self.draining:
            raise DrainingError("this prefill worker is going away")
        result: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        now_s = time.monotonic()
        layout = self._device.layout
        names = prefix_hashes(token_ids, layout.block_tokens, chain_salt(layout.fingerprint, cache_salt))
        job = self._job(Prompt(request_id, token_ids, samplers, names, now_s, result), deadline.at_s, priority)
        self._scheduler.enter(job)
        self._idle.clear()
        with observed(job.payload, self._metrics):
            return await self._computed(job, deadline)

    async def _computed(self, job: Job[Prompt], deadline: Deadline) -> Prefilled:
        """Queues a prompt that has been entered, with what others have of it, and waits for it."""
        prompt = job.payload
        try:
            async with asyncio.timeout(deadline.at_s - time.monotonic()):
                await self._fetcher.fetch(job.names[: job.reusable_blocks], deadline, prompt.request_id)
                self._scheduler.submit(job, time.monotonic())
                self._work.set()
                return await prompt.result
        except TimeoutError as error:
            self._abandon(job)
            raise DeadlineError("the deadline passed before the prompt was computed") from error
        except BaseException:  # also when it is cancelled
            self._abandon(job)
            raise

    def _job(self, prompt: Prompt, deadline_s: float, priority: int) -> Job[Prompt]:
        job = Job(len(prompt.token_ids), deadline_s, prompt, priority)
        if not self._scheduler.index.is_off:
            block_tokens = self._device.layout.block_tokens
            job.names = prompt.names[: job.tokens // block_tokens]
            if prompt.samplers[0].params.prompt_logprobs is None:  # else the logits of every token are needed
                job.reusable_blocks = (job.tokens - 1) // block_tokens
        return job

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
        """Takes slabs back."""
        self._scheduler.pools.give_back(slabs)
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
            now_s = time.monotonic()
            step = self._scheduler.next_step(now_s)
            for job in step.late:
                _fail(job.payload, DeadlineError("the deadline is too near for what is left of the prompt"))
                self._drop(job)
            if step.chunks:
                await self._run(step.chunks, now_s)
                self._work.set()
            self._note_idle()

    async def _run(self, chunks: list[Chunk[Prompt]], started_s: float) -> None:
        self._stepping = [chunk.job for chunk in chunks]
        starting = [job for job in self._stepping if job.payload.sequence is None]
        for job in starting:
            self._start(job, started_s)
        refused = await self._refused([job for job in starting if job.run])
        chunks = [chunk for chunk in chunks if chunk.job not in refused]
        tokens, pairs = _work_of(chunks)
        outcomes = await self._try_compute(chunks) if chunks else []
        self._stepping = []
        ended_s = time.monotonic()
        if chunks:
            self._metrics.step_seconds.observe(ended_s - started_s)
        self._scheduler.advance(chunks, ended_s - started_s, ended_s)
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            chunk.job.payload.steps += 1
            self._publish(chunk.job)
            self._finish(chunk.job, outcome, ended_s)
        for job in refused:
            self._restart(job)
        if chunks and not any(isinstance(outcome, ZipserveError) for outcome in outcomes):
            self._metrics.steps.note(Step(tokens, pairs, 0, 0, time.monotonic() - started_s))

    def _start(self, job: Job[Prompt], now_s: float) -> None:
        prompt = job.payload
        prompt.started_s = now_s
        prompt.sequence = Sequence(job.slabs.blocks, job.slot, job.computed, sinks=next(iter(job.slabs.sinks), -1))
        prompt.sealed = [block.refs for block in job.run]
        self._metrics.prefix_blocks.labels("hit").inc(len(job.run))
        self._metrics.prefix_blocks.labels("miss").inc(job.reusable_blocks - len(job.run))

    async def _refused(self, jobs: list[Job[Prompt]]) -> list[Job[Prompt]]:
        """Those of which a reused block is not what it should be; it leaves the index."""
        refused = []
        for job in jobs:
            unsound = await self._device.run(self._seals.first_unsound, job.run)
            if unsound is not None:
                error = unsound.error
                self._metrics.handoff_failures.labels(error.reason).inc()
                _log.error("block.unsound", reason=error.reason, error=error.message)
                self._scheduler.index.discard(unsound.block)
                refused.append(job)
        return refused

    def _restart(self, job: Job[Prompt]) -> None:
        prompt = job.payload
        if prompt.result.done():  # nobody waits any more
            self._drop(job)
            return
        self._scheduler.restart(job)
        prompt.sequence = None
        prompt.sealed.clear()

    async def _try_compute(self, chunks: list[Chunk[Prompt]]) -> list[_Outcome]:
        try:
            return await self._device.run(self._compute, chunks)
        except Exception:  # noqa: BLE001  # one bad step must not end the worker
            _log.exception("step.failed", requests=[job.payload.request_id for job in self._stepping])
            error = UnavailableError("computing the prompt failed; the worker's log has the details")
            return [error for _ in chunks]

    def _publish(self, job: Job[Prompt]) -> None:
        """Lets others find the blocks that the last step has sealed."""
        for block in range(len(job.run), min(len(job.names), len(job.payload.sealed))):
            if not self._scheduler.index.extend(job.run, job.names[block], job.payload.sealed[block]):
                break

    def _finish(self, job: Job[Prompt], outcome: _Outcome, ended_s: float) -> None:
        prompt = job.payload
        if isinstance(outcome, ZipserveError):
            _fail(prompt, outcome)
        if prompt.result.done():  # it has failed, or nobody waits any more
            self._drop(job)
        elif isinstance(outcome, _Computed):
            refs = [ref for block in prompt.sealed for ref in block] + outcome.tail
            handle = self._source.issue(refs, len(prompt.token_ids), job.slabs)
            self._metrics.prompt_tokens.inc(len(prompt.token_ids))
            cached_tokens = job.reused_blocks * self._device.layout.block_tokens
            queue_s, compute_s = prompt.started_s - prompt.submitted_s, ended_s - prompt.started_s
            prompt.result.set_result(
                Prefilled(outcome.drawn, prompt.logprobs, handle, cached_tokens, queue_s, compute_s)
            )

    def _note_idle(self) -> None:
        if not (self._scheduler.queued_requests or self._scheduler.running_requests):
            self._idle.set()

    # In the device's thread.

    def _compute(self, chunks: list[Chunk[Prompt]]) -> list[_Outcome]:
        prompts = [chunk.job.payload for chunk in chunks]
        last = [i for i, chunk in enumerate(chunks) if chunk.is_last]
        owners = [i for i in last for _ in prompts[i].samplers]
        samplers = [sampler for i in last for sampler in prompts[i].samplers]
        for sampler in samplers:
            sampler.look_ahead(self._device.beside)
        step = self._device.engine.forward([_segment(chunk) for chunk in chunks])
        tokens = draw(step.logits[owners], samplers, [len(prompts[i].token_ids) for i in owners])
        outcomes: list[_Outcome] = [step.failed.get(i) for i in range(len(chunks))]
        for i, rows in step.every.items():
            prompts[i].logprobs += prompt_logprobs(
                rows, prompts[i].token_ids, chunks[i].job.computed, prompts[i].samplers[0].params.prompt_logprobs or 0
            )
        seal_s = time.monotonic()
        for i, chunk in enumerate(chunks):
            if outcomes[i] is None:
                seal_blocks(self._seals, chunk)
        for i in last:
            drawn = [token for token, owner in zip(tokens, owners, strict=True) if owner == i]
            outcomes[i] = outcomes[i] or self._completed(chunks[i].job, drawn)
            prompts[i].seal_s = seal_s, time.monotonic()
        return outcomes

    def _completed(self, job: Job[Prompt], tokens: list[Drawn | ZipserveError]) -> _Outcome:
        """Of a prompt whose last chunk was computed; the choices share what becomes of it."""
        drawn = [token for token in tokens if isinstance(token, Drawn)]
        failed = next((token for token in tokens if isinstance(token, ZipserveError)), None)
        try:
            return failed or _Computed(drawn, seal_tail(self._seals, self._device.cache, job))
        except KvValueError as error:
            return error


def _segment(chunk: Chunk[Prompt]) -> Segment:
    job, sequence = chunk.job, chunk.job.payload.sequence
    assert sequence is not None
    wants_logprobs = job.payload.samplers[0].params.prompt_logprobs is not None
    return Segment(sequence, job.payload.token_ids[job.computed : job.computed + chunk.tokens], wants_logprobs)


def _work_of(chunks: list[Chunk[Prompt]]) -> tuple[int, int]:
    """Tokens of a step, and pairs of them with those that they attend to."""
    return sum(chunk.tokens for chunk in chunks), sum(pairs_of(chunk.job.computed, chunk.tokens) for chunk in chunks)


def _fail(prompt: Prompt, error: Exception) -> None:
    if not prompt.result.done():
        prompt.result.set_exception(error)
