"""Puts the KV store together and gives it its life cycle.

A store has no model, so it learns from the first worker that it sees what a block is. Until then it holds nothing.
"""

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc

from zipserve.common import __version__, log
from zipserve.common.errors import LayoutMismatchError
from zipserve.common.kv.holders import HolderKey
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.kv.refs import layout_of, message_of
from zipserve.common.kv.seals import Seals
from zipserve.common.levels import tell_build, watch_pools
from zipserve.common.metrics import Metrics
from zipserve.common.threads import in_thread
from zipserve.common.transfer.peers import Peers
from zipserve.common.transport import TransportFactory
from zipserve.common.transport.nixl import NixlTransport
from zipserve.kvstore.arenas import HostArenas
from zipserve.kvstore.config import KvStoreSettings
from zipserve.kvstore.disk import DiskTier
from zipserve.kvstore.store import Store
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

_log = log.get()
_READS_FROM = (WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE)


class KvStoreService:
    """A `zipserve.common.rpc.server.Service`."""

    def __init__(self, settings: KvStoreSettings, open_transport: TransportFactory = NixlTransport) -> None:
        self._settings = settings
        self._incarnation = secrets.randbits(64)
        self._memory = ExitStack()
        self._loop: asyncio.Task[None] | None = None
        self._draining = False
        self.metrics = Metrics("kvstore")
        self.peers = Peers(
            settings,
            self._incarnation,
            self.metrics,
            open_transport,
            lease_ttl_s=settings.lease_ttl_s,
            reads_from=_READS_FROM,
            fetch_s=settings.fetch_s,
        )
        self.pools: SlabPools | None = None
        self.store: Store | None = None

    async def start(self, address: str) -> None:
        self._capabilities = Capabilities(
            worker_id=self._settings.worker_id,
            incarnation=self._incarnation,
            role=WorkerRole.WORKER_ROLE_KVSTORE,
            address=address,
            version=__version__,
        )
        await self.peers.open()
        self._loop = asyncio.create_task(self._run(), name="kvstore-loop")

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        return self.peers.add_to(server)

    def entrance(self) -> None:
        return None

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def load(self) -> Load:
        levels = self.pools.levels() if self.pools else {}
        idle_blocks = self.pools.blocks.idle if self.pools else 0
        return Load(leases=self.peers.source.leases, draining=self._draining, idle_blocks=idle_blocks, **levels)

    def begin_drain(self) -> None:
        self._draining = True
        self.peers.sharing.draining = True

    async def drained(self) -> None:
        await self.peers.drained()

    def loops(self) -> list[asyncio.Task[None]]:
        return [self._loop] if self._loop else []

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        await self.peers.close()
        if self.store is not None:
            await self.store.settled()
        await asyncio.to_thread(self._memory.close)

    async def _run(self) -> None:
        layout = await self._first_layout()
        store = await self._open(layout)
        loops = [asyncio.create_task(store.run(self.peers.fetcher, self.peers.holders)), *self.peers.loops()]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            loops[0].cancel()
            await asyncio.gather(loops[0], return_exceptions=True)  # it may be writing

    async def _first_layout(self) -> Layout:
        """Of the first worker that has one which we know."""
        while True:
            for record in [record for role in _READS_FROM for record in self.peers.registry.workers(role)]:
                facts = record.capabilities
                try:
                    layout = layout_of(facts.layout)
                except LayoutMismatchError as error:
                    _log.warning("layout.unknown", peer=record.worker_id, error=error.message)
                    continue
                if layout.fingerprint in facts.readable_layouts:
                    return layout
            await self.peers.registry.wait_for_change(self._settings.heartbeat_s)

    async def _open(self, layout: Layout) -> Store:
        settings = self._settings
        blocks = max(1, settings.memory_bytes // layout.slab_bytes(SlabKind.BLOCK))
        sinks = min(blocks, max(settings.sinks_min, blocks // 4))
        arenas = HostArenas(layout, blocks=blocks, sinks=sinks)
        self._memory.callback(arenas.close)
        seals = Seals(layout, self._incarnation, arenas.slab_view)
        pools = self.pools = SlabPools(layout, blocks=blocks, tails=0, sinks=sinks)
        pools.on_free = seals.poison
        self.peers.source.on_free = pools.give_back
        disk = await in_thread(self._open_disk, layout)
        store = self.store = Store(PrefixIndex(pools), seals, self._incarnation, disk, self.metrics)
        tell_build(self.metrics, "kvstore", layout)
        watch_pools(self.metrics, layout, store.index)
        self.metrics.disk_blocks.set_function(lambda: len(disk) if disk else 0)
        await self.peers.join(store, arenas.arenas, on_added=self._heard_of)
        self._capabilities.layout.CopyFrom(message_of(layout))
        self._capabilities.readable_layouts.append(layout.fingerprint)
        self._capabilities.layout_description = layout.description
        self._capabilities.block_tokens = layout.block_tokens
        _log.info("store.opened", blocks=blocks, disk_blocks=len(disk) if disk else 0, layout=layout.description)
        return store

    def _open_disk(self, layout: Layout) -> DiskTier | None:
        settings = self._settings
        if not settings.disk_path:
            return None
        disk_blocks = max(1, settings.disk_bytes // layout.slab_bytes(SlabKind.BLOCK))
        disk = DiskTier.open(Path(settings.disk_path), layout, disk_blocks)
        self._memory.callback(disk.close)
        return disk

    def _heard_of(self, holder: HolderKey, names: Sequence[bytes]) -> None:
        record = self.peers.registry.find(holder[0])
        if self.store is None or record is None or record.capabilities.role not in _READS_FROM:
            return
        if self.store.seals.layout.fingerprint in record.capabilities.readable_layouts:
            for name in names:
                self.store.want(name)
