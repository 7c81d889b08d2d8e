"""Puts the KV store together and gives it its life cycle."""

import asyncio
import secrets

import grpc

from zipserve.common import __version__
from zipserve.common.metrics import Metrics
from zipserve.kvstore.config import KvStoreSettings
from zipserve.kvstore.directory import Directory
from zipserve.kvstore.servicer import KvStoreServicer
from zipserve.v1 import kv_store_service_pb2_grpc
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole


class KvStoreService:
    """A `zipserve.common.rpc.server.Service`."""

    def __init__(self, settings: KvStoreSettings) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self._draining = False

    async def start(self, address: str) -> None:
        self._capabilities = Capabilities(
            worker_id=self._settings.worker_id,
            incarnation=secrets.randbits(64),
            role=WorkerRole.WORKER_ROLE_KVSTORE,
            address=address,
            version=__version__,
        )

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        kv_store_service_pb2_grpc.add_KvStoreServiceServicer_to_server(KvStoreServicer(Directory()), server)
        return ["zipserve.v1.KvStoreService"]

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def load(self) -> Load:
        return Load(draining=self._draining)

    def begin_drain(self) -> None:
        self._draining = True

    async def drained(self) -> None:
        """No work outlives a call."""

    def loops(self) -> "list[asyncio.Task[None]]":
        return []

    async def close(self) -> None:
        """Nothing is held."""
