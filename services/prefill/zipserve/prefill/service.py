"""Puts the prefill service together and gives it its life cycle."""

import asyncio
import time

import grpc

from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.kv.seals import Seals
from zipserve.common.levels import tell_build, watch_pools, watch_queue
from zipserve.common.metrics import Metrics
from zipserve.common.transfer.peers import Peers
from zipserve.common.transfer.sharing import IndexShelf
from zipserve.common.transport import TransportFactory
from zipserve.common.transport.nixl import NixlTransport
from zipserve.engine.device import Device
from zipserve.prefill.config import PrefillSettings
from zipserve.prefill.prompt import Prompt
from zipserve.prefill.scheduler import PrefillScheduler
from zipserve.prefill.servicer import PrefillServicer
from zipserve.prefill.worker import PrefillWorker
from zipserve.v1 import prefill_service_pb2_grpc
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

_READS_FROM = (WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE, WorkerRole.WORKER_ROLE_KVSTORE)


class PrefillService:
    """A `zipserve.common.rpc.server.Service`."""

    def __init__(self, settings: PrefillSettings, open_transport: TransportFactory = NixlTransport) -> None:
        self._settings = settings
        self.metrics = Metrics("prefill")
        self.device = Device(settings)
        self.peers = Peers(
            settings,
            self.device.incarnation,
            self.metrics,
            open_transport,
            lease_ttl_s=settings.lease_ttl_s,
            reads_from=_READS_FROM,
            fetch_s=settings.fetch_s,
        )
        self.source = self.peers.source
        self._loop: asyncio.Task[None] | None = None

    async def start(self, address: str) -> None:
        settings, device = self._settings, self.device
        await device.start()
        self._capabilities = device.capabilities(WorkerRole.WORKER_ROLE_PREFILL, address)
        pools = SlabPools(device.layout, blocks=settings.kv_blocks, tails=settings.kv_tails, sinks=settings.sinks)
        self.scheduler: PrefillScheduler[Prompt] = PrefillScheduler(
            PrefixIndex(pools, settings.prefix_blocks_max),
            slots=settings.sequences_max,
            step_tokens=device.step_tokens,
            queue_requests_max=settings.queue_requests_max,
            queue_tokens_max=settings.queue_tokens_max,
        )
        index, seals = self.scheduler.index, Seals(device.layout, device.incarnation, device.slab_view)
        self._tell_levels()
        await self.peers.open()
        await self.peers.join(IndexShelf(index, seals), device.arenas)
        fetcher = self.peers.fetcher
        self.worker = PrefillWorker(device, self.scheduler, seals, self.source, fetcher, self.metrics)
        self.source.on_free = self.worker.free
        self._loop = asyncio.create_task(self.worker.run(), name="prefill-loop")

    def _tell_levels(self) -> None:
        metrics, scheduler, layout = self.metrics, self.scheduler, self.device.layout
        tell_build(metrics, "prefill", layout)
        watch_pools(metrics, layout, scheduler.index)
        watch_queue(metrics, scheduler)

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        servicer = PrefillServicer(self.worker, self.source, self.device, self._settings.deadline_default_s)
        prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)
        return ["zipserve.v1.PrefillService", *self.peers.add_to(server)]

    def entrance(self) -> None:
        return None

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
            prefill_tokens_per_second=self.scheduler.tokens_per_s(time.monotonic()),
            **self.scheduler.pools.levels(),
        )

    def begin_drain(self) -> None:
        self.worker.draining = True
        self.peers.sharing.draining = True

    async def drained(self) -> None:
        await self.worker.drained()

    def loops(self) -> list[asyncio.Task[None]]:
        return [self._loop, *self.peers.loops()] if self._loop else []

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        await self.peers.close()
        await asyncio.to_thread(self.device.close)
