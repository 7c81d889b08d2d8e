"""A worker's place among those who share KV: what it lends, what it knows of the others, and how it reads from them."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress

import grpc

from zipserve.common.directory import DirectoryView, DirectoryWriter
from zipserve.common.errors import ZipserveError
from zipserve.common.kv.holders import HolderKey, Holders
from zipserve.common.kv.pools import Slabs
from zipserve.common.metrics import Metrics
from zipserve.common.registry import RegistryView
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.settings import ServiceSettings
from zipserve.common.transfer.fetch import PrefixFetcher
from zipserve.common.transfer.puller import KvPuller
from zipserve.common.transfer.sharing import BlockSharing, Shelf
from zipserve.common.transfer.source import KvSource
from zipserve.common.transport import ArenaInfo, Transport, TransportFactory
from zipserve.v1 import kv_store_service_pb2_grpc, kv_transfer_service_pb2_grpc
from zipserve.v1.worker_service_pb2 import WorkerRole


def _ignore(holder: HolderKey, names: Sequence[bytes]) -> None:
    """What others hold is looked up when it is needed."""


class Peers:
    """Of one incarnation of a worker. `open` it, `join` when there are slabs, `close` it. Lives in the event loop.

    Args:
        lease_ttl_s: time for which lent slabs wait for their reader without a heartbeat.
        reads_from: roles of the workers to which connections are made early.
        fetch_s: longest wait for blocks that others hold, see `PrefixFetcher`.
    """

    transport: Transport
    puller: KvPuller
    fetcher: PrefixFetcher

    def __init__(
        self,
        settings: ServiceSettings,
        incarnation: int,
        metrics: Metrics,
        open_transport: TransportFactory,
        *,
        lease_ttl_s: float,
        reads_from: Sequence[WorkerRole.ValueType],
        fetch_s: float = 0.0,
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._metrics = metrics
        self._open_transport = open_transport
        self._reads_from = reads_from
        self._fetch_s = fetch_s
        self._secret = settings.secret_bytes
        self._resources = AsyncExitStack()
        self._loops: list[asyncio.Task[None]] = []
        self._channels = ChannelPool.within(settings)
        self.registry = RegistryView(settings)
        self.holders = Holders()
        self.source = KvSource(
            worker_id=settings.worker_id,
            incarnation=incarnation,
            secret=self._secret,
            lease_ttl_s=lease_ttl_s,
            metrics=metrics,
        )
        self.sharing = BlockSharing(self.source, metrics)

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        """Adds the services that peers call to a server, and returns their names."""
        kv_transfer_service_pb2_grpc.add_KvTransferServiceServicer_to_server(self.source, server)
        kv_store_service_pb2_grpc.add_KvStoreServiceServicer_to_server(self.sharing, server)
        return ["zipserve.v1.KvTransferService", "zipserve.v1.KvStoreService"]

    async def open(self) -> None:
        """Takes a first look at who is there."""
        await self._resources.enter_async_context(self.registry)
        await self._resources.enter_async_context(self._channels)

    async def join(
        self,
        shelf: Shelf,
        arenas: list[ArenaInfo],
        on_added: Callable[[HolderKey, Sequence[bytes]], None] = _ignore,
    ) -> None:
        """Lends what is on a shelf, and reads from the others into its slabs.

        Args:
            arenas: the memory of the slabs.
            on_added: called with a holder and the blocks that it is found to have.

        Raises:
            TransferError: the transport cannot start.
        """
        settings, me = self._settings, (self._settings.worker_id, self._incarnation)
        self.transport = self._open_transport(f"{me[0]}-{me[1]:016x}", arenas)
        self._resources.push_async_callback(asyncio.to_thread, self.transport.close)
        self.source.attach(self.transport, arenas, shelf.seals.layout)
        self.puller = KvPuller(
            worker_id=settings.worker_id,
            secret=self._secret,
            layout=shelf.seals.layout,
            transport=self.transport,
            arenas=arenas,
            slab_view=shelf.seals.slab_view,
            registry=self.registry,
            channels=self._channels,
            metrics=self._metrics,
        )
        self._resources.push_async_callback(self.puller.settled)
        self.fetcher = PrefixFetcher(
            myself=me,
            index=shelf.index,
            seals=shelf.seals,
            puller=self.puller,
            give_back=self._give_back,
            holders=self.holders,
            metrics=self._metrics,
            time_s=self._fetch_s,
        )
        self._resources.push_async_callback(self.fetcher.close)
        self.sharing.attach(shelf)  # before anybody hears of what is here
        self._writer = DirectoryWriter(settings, self._incarnation, shelf.entries)
        shelf.watch(self._tell_added, self._tell_removed)  # before the writer lists what is there
        await self._resources.enter_async_context(self._writer)
        await self._resources.enter_async_context(DirectoryView(settings, self.registry, self.holders, on_added))
        self._loops += [
            asyncio.create_task(self.source.run_reaper(), name="lease-reaper"),
            asyncio.create_task(self._connect_early(), name="connect-early"),
        ]

    def loops(self) -> list[asyncio.Task[None]]:
        """Background tasks that never end by themselves."""
        return self._loops

    async def drained(self) -> None:
        """Returns when nobody reads here any more."""
        await self.source.no_leases()

    async def close(self) -> None:
        """Ends what is being read, gives all leases up, and takes the own entry out of the directory."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self._resources.aclose()

    async def _connect_early(self) -> None:
        """Connects to every worker that comes, so that no request pays for it."""
        while True:
            records = [record for role in self._reads_from for record in self.registry.workers(role)]
            with suppress(ZipserveError):  # a pull that needs the connection will say so
                await self.puller.connect_early([r for r in records if r.worker_id != self._settings.worker_id])
            await self.registry.wait_for_change(self._settings.heartbeat_s * 4)

    def _give_back(self, slabs: Slabs) -> None:
        """As if a lease over them had ended: somebody may wait for them."""
        self.source.on_free(slabs)

    def _tell_added(self, name: bytes, parent: bytes) -> None:
        self._writer.added(parent, [name])

    def _tell_removed(self, name: bytes) -> None:
        self._metrics.prefix_evictions.inc()
        self._writer.evicted([name])
