"""Puts the prefill service together and gives it its life cycle."""

import asyncio

import grpc

from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.metrics import Metrics
from zipserve.common.transfer.source import KvSource
from zipserve.common.transport import Transport, TransportFactory
from zipserve.common.transport.nixl import NixlTransport
from zipserve.engine.device import Device
from zipserve.prefill.config import PrefillSettings
from zipserve.prefill.prompt import Prompt
from zipserve.prefill.scheduler import PrefillScheduler
from zipserve.prefill.servicer import PrefillServicer
from zipserve.prefill.worker import PrefillWorker
from zipserve.v1 import kv_transfer_service_pb2_grpc, prefill_service_pb2_grpc
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole


class PrefillService:
    """A `zipserve.common.rpc.server.Service`."""

    def __init__(self, settings: PrefillSettings, open_transport: TransportFactory = NixlTransport) -> None:
        self._open_transport = open_transport
        self._settings = settings
        self.metrics = Metrics()
        self.device = Device(settings)
        self._transport: Transport | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, address: str) -> None:
        settings, device = self._settings, self.device
        await device.start()
        self.metrics.bits_per_value.set(device.layout.bits_per_value())
        self._capabilities = device.capabilities(WorkerRole.WORKER_ROLE_PREFILL, address)
        pools = SlabPools(device.layout, blocks=settings.kv_blocks, tails=settings.kv_tails, sinks=settings.sinks)
        self.scheduler: PrefillScheduler[Prompt] = PrefillScheduler(
            PrefixIndex(pools, settings.prefix_blocks_max),
            slots=settings.sequences_max,
            step_tokens=device.step_tokens,
            queue_requests_max=settings.queue_requests_max,
            queue_tokens_max=settings.queue_tokens_max,
        )
        self.source = KvSource(
            worker_id=settings.worker_id,
            incarnation=device.incarnation,
            secret=settings.secret.get_secret_value().encode(),
            layout=device.layout,
            lease_ttl_s=settings.lease_ttl_s,
            metrics=self.metrics,
        )
        self.worker = PrefillWorker(device, self.scheduler, self.source, self.metrics)
        self.source.on_free = self.worker.free
        agent = f"{settings.worker_id}-{device.incarnation:016x}"
        self._transport = self._open_transport(agent, device.arenas, self.source.notified)
        self.source.attach(self._transport, device.arenas)
        self._tasks = [
            asyncio.create_task(self.worker.run(), name="prefill-loop"),
            asyncio.create_task(self.source.run_reaper(), name="lease-reaper"),
        ]

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        servicer = PrefillServicer(self.worker, self.source, self.device, self._settings.deadline_default_s)
        prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)
        kv_transfer_service_pb2_grpc.add_KvTransferServiceServicer_to_server(self.source, server)
        return ["zipserve.v1.PrefillService", "zipserve.v1.KvTransferService"]

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def load(self) -> Load:
        return Load(
            queued_requests=self.scheduler.queued_requests,
            queued_tokens=self.scheduler.queued_tokens,
            running_requests=self.scheduler.running_requests,
            leases=self.source.leases,
            draining=self.worker.draining,
            idle_blocks=self.scheduler.pools.blocks.idle,
            **self.scheduler.pools.levels(),
        )

    def begin_drain(self) -> None:
        self.worker.draining = True

    async def drained(self) -> None:
        await self.worker.drained()

    def loops(self) -> list[asyncio.Task[None]]:
        return self._tasks

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._transport is not None:
            await asyncio.to_thread(self._transport.close)
        await asyncio.to_thread(self.device.close)
