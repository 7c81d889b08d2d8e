"""Puts the decode service together and gives it its life cycle."""

import asyncio
from functools import partial

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
from zipserve.decode.checkpoints import Checkpoints
from zipserve.decode.config import DecodeSettings
from zipserve.decode.pacing import Pacing
from zipserve.decode.scheduler import DecodeScheduler
from zipserve.decode.servicer import DecodeServicer
from zipserve.decode.stream import Stream
from zipserve.decode.worker import DecodeWorker
from zipserve.engine.device import Device
from zipserve.engine.parking import parked_bytes
from zipserve.v1 import decode_service_pb2_grpc
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole


class DecodeService:
    """A `zipserve.common.rpc.server.Service`."""

    def __init__(self, settings: DecodeSettings, open_transport: TransportFactory = NixlTransport) -> None:
        self._settings = settings
        self.metrics = Metrics("decode")
        self.device = Device(settings)
        self.peers = Peers(
            settings,
            self.device.incarnation,
            self.metrics,
            open_transport,
            lease_ttl_s=settings.lease_ttl_s,
            reads_from=[WorkerRole.WORKER_ROLE_PREFILL],
            fetch_s=settings.fetch_s,
        )
        self.source = self.peers.source
        self._loop: asyncio.Task[None] | None = None

    async def start(self, address: str) -> None:
        settings, device = self._settings, self.device
        await device.start()
        self._capabilities = device.capabilities(WorkerRole.WORKER_ROLE_DECODE, address)
        pools = SlabPools(device.layout, blocks=settings.kv_blocks, tails=settings.kv_tails, sinks=settings.sinks)
        index = PrefixIndex(pools, settings.prefix_blocks_max)
        seals = Seals(device.layout, device.incarnation, device.slab_view)
        pools.on_free = seals.poison
        await self.peers.open()
        await self.peers.join(IndexShelf(index, seals), device.arenas)
        self.puller = self.peers.puller
        self.scheduler: DecodeScheduler[Stream] = DecodeScheduler(
            index,
            slots=settings.sequences_max,
            queue_requests_max=settings.queue_requests_max,
            queue_tokens_max=settings.queue_tokens_max,
            parked_bytes_max=settings.parked_bytes_max,
            parked_bytes=partial(parked_bytes, device.layout),
        )
        self._tell_levels()
        self.worker = DecodeWorker(
            device,
            self.scheduler,
            Checkpoints(index, seals, self.metrics),
            self.source,
            self.puller,
            self.peers.fetcher,
            Pacing(device.step_tokens, settings.step_slowdown_max, settings.step_free_s),
            self.metrics,
        )
        self.source.on_free = self.worker.free
        self._loop = asyncio.create_task(self.worker.run(), name="decode-loop")

    def _tell_levels(self) -> None:
        metrics, scheduler, layout = self.metrics, self.scheduler, self.device.layout
        tell_build(metrics, "decode", layout)
        watch_pools(metrics, layout, scheduler.index)
        watch_queue(metrics, scheduler)
        metrics.parked_requests.set_function(lambda: scheduler.parked_requests)
        metrics.parked_bytes.set_function(lambda: scheduler.parked_bytes)

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        servicer = DecodeServicer(self.worker, self.device, self._settings.deadline_default_s)
        decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)
        return ["zipserve.v1.DecodeService", *self.peers.add_to(server)]

    def entrance(self) -> None:
        return None

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def load(self) -> Load:
        return Load(
            queued_requests=self.scheduler.queued_requests,
            queued_tokens=self.scheduler.queued_tokens,
            running_requests=self.scheduler.running_requests,
            parked_requests=self.scheduler.parked_requests,
            leases=self.source.leases,
            draining=self.worker.draining,
            idle_blocks=self.scheduler.pools.blocks.idle,
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
