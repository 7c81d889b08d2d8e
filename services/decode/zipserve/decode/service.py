"""Puts the decode service together and gives it its life cycle."""

import asyncio
from contextlib import suppress
from functools import partial

import grpc

from zipserve.common.errors import ZipserveError
from zipserve.common.kv.pools import SlabPools
from zipserve.common.metrics import Metrics
from zipserve.common.registry import RegistryView
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.transfer.puller import KvPuller
from zipserve.common.transport import Transport, TransportFactory
from zipserve.common.transport.nixl import NixlTransport
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
        self._open_transport = open_transport
        self._settings = settings
        self.metrics = Metrics()
        self.device = Device(settings)
        self._channels = ChannelPool(settings.message_bytes_max)
        self._registry: RegistryView | None = None
        self._transport: Transport | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, address: str) -> None:
        settings, device = self._settings, self.device
        await device.start()
        self.metrics.bits_per_value.set(device.layout.bits_per_value())
        self._capabilities = device.capabilities(WorkerRole.WORKER_ROLE_DECODE, address)
        self._registry = await RegistryView(settings).__aenter__()
        agent = f"{settings.worker_id}-{device.incarnation:016x}"
        self._transport = self._open_transport(agent, device.arenas, None)
        self.puller = KvPuller(
            worker_id=settings.worker_id,
            secret=settings.secret.get_secret_value().encode(),
            layout=device.layout,
            transport=self._transport,
            arenas=device.arenas,
            slab_view=device.slab_view,
            registry=self._registry,
            channels=self._channels,
            metrics=self.metrics,
        )
        self.scheduler: DecodeScheduler[Stream] = DecodeScheduler(
            SlabPools(device.layout, blocks=settings.kv_blocks, tails=settings.kv_tails, sinks=settings.sinks),
            slots=settings.sequences_max,
            queue_requests_max=settings.queue_requests_max,
            queue_tokens_max=settings.queue_tokens_max,
            parked_bytes_max=settings.parked_bytes_max,
            parked_bytes=partial(parked_bytes, device.layout),
        )
        pacing = Pacing(device.step_tokens, settings.step_slowdown_max)
        self.worker = DecodeWorker(device, self.scheduler, self.puller, pacing, self.metrics)
        self._tasks = [
            asyncio.create_task(self.worker.run(), name="decode-loop"),
            asyncio.create_task(self._connect_early(self._registry), name="connect-early"),
        ]

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        servicer = DecodeServicer(self.worker, self.device, self._settings.deadline_default_s)
        decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)
        return ["zipserve.v1.DecodeService"]

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def load(self) -> Load:
        return Load(
            queued_requests=self.scheduler.queued_requests,
            queued_tokens=self.scheduler.queued_tokens,
            running_requests=self.scheduler.running_requests,
            parked_requests=self.scheduler.parked_requests,
            draining=self.worker.draining,
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
        if self._tasks:  # it has started
            await self.puller.settled()
        await self._channels.close()
        if self._registry is not None:
            await self._registry.__aexit__()
        if self._transport is not None:
            await asyncio.to_thread(self._transport.close)
        await asyncio.to_thread(self.device.close)

    async def _connect_early(self, registry: RegistryView) -> None:
        while True:
            with suppress(ZipserveError):  # a pull that needs the connection will say so
                await self.puller.connect_early(registry.workers(WorkerRole.WORKER_ROLE_PREFILL))
            await registry.wait_for_change(self._settings.heartbeat_s * 4)
