"""Computes batches of prompts on the device and hands their KV over under leases."""

import asyncio
import time
from dataclasses import dataclass

from zipserve.common import log
from zipserve.common.errors import DeadlineError, DrainingError, KvValueError, UnavailableError, ZipserveError
from zipserve.common.kv import header, prefix
from zipserve.common.kv.header import SlabIdentity
from zipserve.common.kv.layout import HEADER_BYTES
from zipserve.common.kv.pools import Slabs
from zipserve.common.metrics import Metrics
from zipserve.common.sampling import Sampling
from zipserve.common.transfer.source import KvSource
from zipserve.engine.device import Device
from zipserve.engine.sampling import sample
from zipserve.engine.sequence import Segment, Sequence
from zipserve.prefill.scheduler import Batch, Job, Planned, PrefillScheduler
from zipserve.v1 import kv_pb2

_log = log.get()


@dataclass(frozen=True)
class Prefilled:
    """A computed prompt."""

    token_id: int
    handle: kv_pb2.KvHandle
    queue_s: float
    compute_s: float


@dataclass
class Prompt:
    """What is to be computed, and the future that its caller awaits."""

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    submitted_s: float
    result: "asyncio.Future[Prefilled]"


@dataclass(frozen=True)
class _Computed:
    token_id: int
    refs: list[kv_pb2.BlockRef]


_Outcome = _Computed | ZipserveError
"""Of one prompt of a batch."""


class PrefillWorker:
    """The queue, the batches and the slabs of one prefill worker. Lives in the event loop; `_compute` does not."""

    def __init__(self, device: Device, scheduler: PrefillScheduler[Prompt], source: KvSource, metrics: Metrics) -> None:
        self._device = device
        self._scheduler = scheduler
        self._source = source
        self._metrics = metrics
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.running_requests = 0
        self.draining = False

    async def prefill(self, request_id: str, token_ids: list[int], sampling: Sampling, deadline_s: float) -> Prefilled:
        """Computes a prompt when its turn comes. Cancelling takes it out of the queue and frees its slabs.

        Args:
            deadline_s: on time.monotonic()'s clock.

        Raises:
            DrainingError, OverloadedError, InvalidRequestError: it was not accepted.
            DeadlineError: its turn did not come in time.
            UnavailableError: computing it failed.
        """
        if self.draining:
            raise DrainingError("this prefill worker is going away")
        result: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        prompt = Prompt(request_id, token_ids, sampling, time.monotonic(), result)
        job = Job(len(token_ids), deadline_s, prompt)
        self._scheduler.submit(job)
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
        elif self._scheduler.cancel(job):
            self._work.set()  # the next one may fit where this one did not
            self._note_idle()

    def free(self, slabs: Slabs) -> None:
        """Takes slabs back; poisoned first, so that a late reader notices."""
        for kind, slab in slabs:
            header.poison(self._device.slab_view(kind, slab))
        self._scheduler.pools.give_back(slabs)
        self._metrics.free_blocks.set(self._scheduler.pools.blocks.free)
        self._work.set()

    async def drained(self) -> None:
        """Returns when no prompt is left and every handle was pulled or given up."""
        await self._idle.wait()
        await self._source.no_leases()

    async def run(self) -> None:
        """Computes batch after batch, for ever."""
        while True:
            await self._work.wait()
            self._work.clear()
            batch = self._scheduler.next_batch(time.monotonic())
            for job in batch.expired:
                _fail(job.payload, DeadlineError("the deadline passed in the prefill queue"))
            if batch.planned:
                await self._run(batch)
                self._work.set()
            self._note_idle()

    async def _run(self, batch: Batch[Prompt]) -> None:
        started_s = time.monotonic()
        self.running_requests = len(batch.planned)
        self._metrics.running_requests.set(self.running_requests)
        try:
            outcomes = await self._device.run(self._compute, batch.planned)
        except Exception:  # noqa: BLE001  # one bad step must not end the worker
            _log.exception("batch.failed", requests=[p.job.payload.request_id for p in batch.planned])
            error = UnavailableError("computing the prompt failed; the worker's log has the details")
            outcomes = [error for _ in batch.planned]
        compute_s = time.monotonic() - started_s
        self._metrics.step_seconds.observe(compute_s)
        self.running_requests = 0
        self._metrics.running_requests.set(0)
        for planned, outcome in zip(batch.planned, outcomes, strict=True):
            self._scheduler.free_slot(planned.slot)
            self._finish(planned, outcome, started_s, compute_s)

    def _finish(self, planned: Planned[Prompt], outcome: _Outcome, started_s: float, compute_s: float) -> None:
        prompt = planned.job.payload
        if isinstance(outcome, ZipserveError):
            self.free(planned.slabs)
            _fail(prompt, outcome)
        elif prompt.result.done():
            self.free(planned.slabs)
        else:
            handle = self._source.issue(outcome.refs, len(prompt.token_ids), planned.slabs)
            self._metrics.prompt_tokens.inc(len(prompt.token_ids))
            prompt.result.set_result(Prefilled(outcome.token_id, handle, started_s - prompt.submitted_s, compute_s))

    def _note_idle(self) -> None:
        self._metrics.queued_requests.set(self._scheduler.queued_requests)
        if not self._scheduler.queued_requests and not self.running_requests:
            self._idle.set()

    # In the device's thread.

    def _compute(self, batch: list[Planned[Prompt]]) -> list[_Outcome]:
        sequences = [Sequence(p.slabs.blocks, p.slot, sinks=next(iter(p.slabs.sinks), -1)) for p in batch]
        prompts = [p.job.payload for p in batch]
        step = self._device.engine.forward(
            [Segment(sequence, prompt.token_ids) for sequence, prompt in zip(sequences, prompts, strict=True)]
        )
        tokens = sample(step.logits, [p.sampling for p in prompts], [len(p.token_ids) for p in prompts])
        outcomes: list[_Outcome] = []
        for i, planned in enumerate(batch):
            try:
                outcomes.append(step.failed.get(i) or _Computed(tokens[i], self._seal(planned)))
            except KvValueError as error:
                outcomes.append(error)
        return outcomes

    def _seal(self, planned: Planned[Prompt]) -> list[kv_pb2.BlockRef]:
        layout, token_ids = self._device.layout, planned.job.payload.token_ids
        hashes = prefix.prefix_hashes(token_ids, layout.block_tokens, layout.fingerprint)
        rest = len(token_ids) % layout.block_tokens
        if rest:
            self._device.cache.pack_tail(planned.slot, rest, planned.slabs.tails[0])
        refs = []
        parts = layout.slabs_of(len(token_ids))
        for (kind, slab), generation, (_, position, tokens) in zip(
            planned.slabs, planned.generations, parts, strict=True
        ):
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
