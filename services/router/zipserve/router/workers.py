"""The workers as the registry shows them and gRPC reaches them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

from opentelemetry.trace import Span, SpanKind

from zipserve.common import log, tracing
from zipserve.common.errors import ZipserveError
from zipserve.common.registry import RegistryView, WorkerRecord
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.status import client_errors
from zipserve.router.gather import Pace, gathered
from zipserve.router.policy import Worker
from zipserve.v1.decode_service_pb2 import DecodeRequest, DecodeResponse, EndSequenceRequest
from zipserve.v1.decode_service_pb2_grpc import DecodeServiceStub
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse, ReleaseHandleRequest
from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceStub
from zipserve.v1.worker_service_pb2 import WorkerRole

_log = log.get()
_GIVE_UP_TIMEOUT_S = 2.0


class GrpcWorkers:
    """Calls workers; see `calls.Workers`."""

    def __init__(self, view: RegistryView, channels: ChannelPool) -> None:
        self._view = view
        self._channels = channels
        self._known: dict[WorkerRole.ValueType, dict[str, tuple[WorkerRecord, Worker]]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._pace = Pace()

    def prefills(self) -> list[Worker]:
        """Prefill workers that take work."""
        return self._list(WorkerRole.WORKER_ROLE_PREFILL)

    def decodes(self) -> list[Worker]:
        """Decode workers that take work."""
        return self._list(WorkerRole.WORKER_ROLE_DECODE)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns after the registry's next refresh, or after the time."""
        await self._view.wait_for_change(timeout_s)

    async def prefill(self, worker: Worker, request: PrefillRequest, timeout_s: float) -> PrefillResponse:
        """Computes a prompt."""
        stub = PrefillServiceStub(self._channels.get(worker.address))
        with tracing.span("prefill", _attributes(worker), kind=SpanKind.CLIENT), client_errors():
            return await stub.Prefill(request, timeout=timeout_s, metadata=tracing.outgoing(request.request_id))

    def decode(self, worker: Worker, request: DecodeRequest, timeout_s: float) -> AsyncGenerator[DecodeResponse, None]:
        """Continues a sequence. Closing the generator cancels the call."""
        return self._decode(worker, request, timeout_s, tracing.current())

    async def _decode(
        self, worker: Worker, request: DecodeRequest, timeout_s: float, parent: Span
    ) -> AsyncGenerator[DecodeResponse, None]:
        stub = DecodeServiceStub(self._channels.get(worker.address))
        with tracing.lasting("decode", parent, _attributes(worker), kind=SpanKind.CLIENT) as span, client_errors():
            with tracing.using(span):
                metadata = tracing.outgoing(request.request_id)
            call = stub.Decode(request, timeout=timeout_s, metadata=metadata)
            try:
                async with aclosing(gathered(call, self._pace.pause_s)) as events:
                    async for event in events:
                        yield event
            finally:
                call.cancel()

    def release(self, worker: Worker, handle: KvHandle, request_id: str) -> None:
        """Gives up a handle; if that fails, its lease runs out by itself."""
        stub = PrefillServiceStub(self._channels.get(worker.address))
        metadata = tracing.outgoing(request_id)
        request = ReleaseHandleRequest(handle=handle)
        call = partial(stub.ReleaseHandle, request, timeout=_GIVE_UP_TIMEOUT_S, metadata=metadata)
        self._in_background(call, "handle.release_failed", worker)

    def end_sequence(self, worker: Worker, request: EndSequenceRequest, request_id: str) -> None:
        """Ends a sequence; if that fails, it ends with its call."""
        stub = DecodeServiceStub(self._channels.get(worker.address))
        call = partial(stub.EndSequence, request, timeout=_GIVE_UP_TIMEOUT_S, metadata=tracing.outgoing(request_id))
        self._in_background(call, "sequence.end_failed", worker)

    def _in_background(self, call: Callable[[], Awaitable[object]], failed: str, worker: Worker) -> None:
        """In a task of its own, so that neither a cancelled nor a replayed request waits for it."""

        async def finish() -> None:
            try:
                with client_errors():
                    await call()
            except ZipserveError as error:
                _log.warning(failed, reason=error.reason, error=error.message, peer=worker.worker_id)

        task = asyncio.create_task(finish(), name=failed)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def report_lost(self, worker: Worker) -> None:
        """Hides a worker until a later heartbeat shows that it lives."""
        record = self._view.find(worker.worker_id)
        if record is not None and record.incarnation == worker.incarnation:
            self._view.report_lost(record)

    async def settled(self) -> None:
        """Returns when nothing is being given up; each takes two seconds at most."""
        while self._background:
            await asyncio.gather(*self._background)

    def _list(self, role: WorkerRole.ValueType) -> list[Worker]:
        # a plain record is made once for every one of the registry, which are many fewer than requests
        before, now = self._known.get(role, {}), {}
        for record in self._view.workers(role):
            known = before.get(record.worker_id)
            now[record.worker_id] = known if known and known[0] is record else (record, _plain(record))
        self._known[role] = now
        return [worker for _, worker in now.values()]


def _attributes(worker: Worker) -> dict[str, str]:
    """Of the span of a call."""
    return {"zipserve.worker": worker.worker_id, "zipserve.layout": worker.layout_description}


def _plain(record: WorkerRecord) -> Worker:
    facts, load = record.capabilities, record.load
    return Worker(
        worker_id=facts.worker_id,
        incarnation=facts.incarnation,
        address=facts.address,
        model=facts.model,
        revision=facts.model_revision,
        context_tokens=facts.context_tokens,
        readable_layouts=frozenset(facts.readable_layouts),
        writable_layout=facts.writable_layout,
        layout_description=facts.layout_description,
        queued_requests=load.queued_requests,
        queued_tokens=load.queued_tokens,
        running_requests=load.running_requests,
        parked_requests=load.parked_requests,
        free_blocks=load.free_blocks,
        prefill_tokens_per_s=load.prefill_tokens_per_second,
        block_tokens=facts.block_tokens,
        eos_token_ids=frozenset(facts.eos_token_ids),
    )
