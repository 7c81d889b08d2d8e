"""The workers of a running cluster, and the steps that they tell."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from pydantic_settings import SettingsConfigDict

from zipserve.common.errors import UnavailableError
from zipserve.common.registry import RegistryView, WorkerRecord
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.rpc.status import client_errors
from zipserve.common.settings import ServiceSettings
from zipserve.common.steps import Step
from zipserve.planner.native.profile import Role
from zipserve.planner.profiling.grid import ROOM_TOKENS, Limits
from zipserve.v1.worker_service_pb2 import ListStepsRequest, WorkerRole
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

_TIMEOUT_S = 10.0
_LOOK_S = 0.5
_STEPS_MAX = 400_000
"""Of one worker: more are not learned from."""
_ROLES: dict[WorkerRole.ValueType, Role] = {
    WorkerRole.WORKER_ROLE_PREFILL: "prefill",
    WorkerRole.WORKER_ROLE_DECODE: "decode",
}


class ProfileSettings(ServiceSettings):
    """How the cluster is found: `ZIPSERVE_PROFILE_REDIS_URL`, `…_CLUSTER`, `…_SECRET`, and TLS as services have it."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_PROFILE_")


@dataclass
class Watched:
    """A worker, and what it has told since it is watched."""

    record: WorkerRecord
    steps: list[Step] = field(default_factory=list)
    lost: int = 0
    """Steps that it did not keep until we asked."""
    last: int = 0

    @property
    def name(self) -> str:
        """Its id."""
        return self.record.worker_id

    @property
    def address(self) -> str:
        """host:port of its RPCs."""
        return self.record.capabilities.address

    @property
    def role(self) -> Role:
        """What it does."""
        return _ROLES[self.record.capabilities.role]

    def limits(self, tokens_max: int) -> Limits:
        """What it bears, in sequences of up to so many tokens."""
        facts, load = self.record.capabilities, self.record.load
        context = facts.context_tokens - ROOM_TOKENS
        held = load.total_blocks * facts.block_tokens // 2
        return Limits(
            facts.sequences_max,
            load.total_blocks,
            load.total_tails,
            facts.block_tokens,
            max(1, min(tokens_max, context, held)),
        )


@dataclass(frozen=True)
class Cluster:
    """What the registry shows."""

    workers: list[Watched]
    """Those that compute."""
    router: str
    """host:port of one; empty: there is none."""
    channels: ChannelPool
    """To services of the cluster, which want its token."""


@asynccontextmanager
async def opened(settings: ProfileSettings) -> AsyncIterator[Cluster]:
    """The cluster as it is now.

    Raises:
        UnavailableError: Redis cannot be reached, or nobody there computes anything.
    """
    async with AsyncExitStack() as stack:
        view = await stack.enter_async_context(RegistryView(settings))
        if not view.reachable:
            raise UnavailableError("Redis cannot be reached")
        workers = [Watched(record) for role in _ROLES for record in view.workers(role)]
        if not workers:
            raise UnavailableError(f"no worker of cluster {settings.cluster} is in the registry")
        routers = [record.capabilities.address for record in view.workers(WorkerRole.WORKER_ROLE_ROUTER)]
        channels = await stack.enter_async_context(ChannelPool.within(settings))
        yield Cluster(workers, routers[0] if routers else "", channels)


@asynccontextmanager
async def watching(cluster: Cluster) -> AsyncIterator[None]:
    """Collects the steps that the workers compute while the context is open.

    Raises:
        ZipserveError: a worker cannot be asked any more.
    """
    await _look(cluster, cluster.workers)
    for worker in cluster.workers:
        worker.steps.clear()
        worker.lost = 0
    looking = asyncio.create_task(_keep_looking(cluster), name="watch-steps")
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    await _look(cluster, cluster.workers)


async def _keep_looking(cluster: Cluster) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        await _look(cluster, cluster.workers)


async def _look(cluster: Cluster, workers: Iterable[Watched]) -> None:
    await asyncio.gather(*(_read(cluster.channels, worker) for worker in workers))


async def _read(channels: ChannelPool, worker: Watched) -> None:
    """Takes over all that is new."""
    stub = WorkerServiceStub(channels.get(worker.address))
    while True:
        with client_errors():
            answer = await stub.ListSteps(ListStepsRequest(after=worker.last), timeout=_TIMEOUT_S)
        if answer.incarnation != worker.record.incarnation:
            raise UnavailableError(f"{worker.name} has been started anew")
        if answer.next != worker.last + answer.lost + len(answer.steps):
            raise UnavailableError(f"{worker.name} counts its steps from {worker.last} to {answer.next}, wrongly")
        worker.last, worker.lost = answer.next, worker.lost + answer.lost
        if not answer.steps:
            return
        if len(worker.steps) < _STEPS_MAX:
            worker.steps += [
                Step(step.prompt_tokens, step.pairs, step.rows, step.context_tokens, to_seconds(step.duration))
                for step in answer.steps
            ]
