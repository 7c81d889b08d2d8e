"""Finds out which children are ready: Redis answers, workers stand in the registry, the router serves."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import redis.asyncio as redis
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic_settings import SettingsConfigDict
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from zipserve.cli.supervisor import Child
from zipserve.common.registry import RegistryView
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.settings import ServiceSettings
from zipserve.v1.inference_service_pb2 import ListModelsRequest
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.worker_service_pb2 import WorkerRole

_PROBE_TIMEOUT_S = 1.0
_POLL_S = 0.1


class UpSettings(ServiceSettings):
    """Lets `up` read the registry as a service does."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_UP_")


async def redis_ready(url: str) -> bool:
    """Whether Redis answers under this URL and takes its password."""
    client = redis.Redis.from_url(
        url,
        socket_timeout=_PROBE_TIMEOUT_S,
        socket_connect_timeout=_PROBE_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),  # its default sleeps for seconds
    )
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()


class Readiness:
    """Looks at all children again and again, and gives those that are ready their `address`.

    What the registry shows at first belongs to others. `on_ready` is called once per life of a child.
    """

    def __init__(self, settings: ServiceSettings, router: str, on_ready: Callable[[Child], None]) -> None:
        self._redis_url = settings.redis_url
        self._router = router
        self._on_ready = on_ready
        self._view = RegistryView(settings)
        self._channels = ChannelPool(settings.message_bytes_max)
        self._looked = asyncio.Event()
        self._open = asyncio.Event()
        self._stale: set[int] = set()
        """Incarnations that have ended, though the registry may still show them."""

    async def __aenter__(self) -> "Readiness":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channels.close()

    def forget(self, name: str) -> None:
        """Tells that the present life of a worker has ended."""
        record = self._view.find(name)
        if record is not None:
            self._stale.add(record.incarnation)

    async def watch(self, children: Mapping[str, Child]) -> None:
        """Waits for Redis, then never returns. More children may be added meanwhile, workers only once it is open."""
        while not await redis_ready(self._redis_url):  # noqa: ASYNC110  nobody in this process could set an event
            await asyncio.sleep(_POLL_S)
        async with self._view:
            self._stale = {record.incarnation for role in WorkerRole.values() for record in self._view.workers(role)}
            self._open.set()
            while True:
                waiting = [child for child in children.values() if child.process is not None and not child.ready]
                await asyncio.gather(*(self._look_at(child) for child in waiting))
                self._looked.set()
                self._looked.clear()
                await asyncio.sleep(_POLL_S)

    async def open(self) -> None:
        """Returns once Redis answers and the registry has been read."""
        await self._open.wait()

    async def looked(self) -> None:
        """Returns after the next look at the children."""
        await self._looked.wait()

    async def models_served(self) -> None:
        """Returns once the router knows of workers that can serve."""
        stub = InferenceServiceStub(self._channels.get(self._router))
        while True:
            try:
                if (await stub.ListModels(ListModelsRequest(), timeout=_PROBE_TIMEOUT_S)).models:
                    return
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:  # it asks for keys: then it is up
                    return
            await asyncio.sleep(_POLL_S)

    async def _look_at(self, child: Child) -> None:
        life = child.lives
        address = await self._probe(child)
        if address and child.lives == life and child.process is not None:
            child.address = address
            self._on_ready(child)

    async def _probe(self, child: Child) -> str:
        """Where the child answers; empty while it does not."""
        if child.spec.role == "redis":
            return self._redis_url.rpartition("@")[2] if await redis_ready(self._redis_url) else ""
        if child.spec.role == "router":
            return self._router if await self._router_serves() else ""
        record = self._view.find(child.spec.name)
        if record is None or record.load.draining or record.incarnation in self._stale:
            return ""
        return record.capabilities.address

    async def _router_serves(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self._channels.get(self._router))
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
