"""A prefill and a decode worker in the test's event loop, behind real gRPC, so that a test can reach into them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inprocess import SECRET, running
from polling import until
from zipserve.common import errors
from zipserve.common.kv.pools import Slabs
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.door import ClusterTokens
from zipserve.common.rpc.status import client_errors
from zipserve.common.transport import TransportFactory
from zipserve.common.transport.nixl import NixlTransport
from zipserve.decode.config import DecodeSettings
from zipserve.decode.service import DecodeService
from zipserve.engine.device import Device
from zipserve.kvstore.config import KvStoreSettings
from zipserve.kvstore.service import KvStoreService
from zipserve.prefill.config import PrefillSettings
from zipserve.prefill.service import PrefillService
from zipserve.v1.decode_service_pb2 import DecodeRequest, DecodeResponse
from zipserve.v1.decode_service_pb2_grpc import DecodeServiceStub
from zipserve.v1.kv_pb2 import KvClaims, KvHandle
from zipserve.v1.kv_transfer_service_pb2_grpc import KvTransferServiceStub
from zipserve.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse
from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceStub
from zipserve.v1.sampling_pb2 import SamplingParams
from zipserve.v1.worker_service_pb2 import GetCapabilitiesRequest, Load
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:  # these names exist in the stubs only
    from zipserve.v1.decode_service_pb2_grpc import DecodeServiceAsyncStub
    from zipserve.v1.kv_transfer_service_pb2_grpc import KvTransferServiceAsyncStub
    from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceAsyncStub

BLOCK = 16
"""Tokens per block in these tests: the smallest there is, so that short prompts fill several."""
GREEDY = SamplingParams(temperature=0, seed=1)
MESSAGE_BYTES_MAX = 64 << 20
"""Of the tests' own channels: a worker's limit is what is tested, not ours."""


def prompt(tokens: int, salt: int = 0) -> list[int]:
    """Token ids for the tiny model; another salt gives other ones."""
    return [3 + (i * 37 + salt * 101 + (i * i) // 7) % 250 for i in range(tokens)]


def claims_of(handle: KvHandle) -> KvClaims:
    """What a handle says, unchecked."""
    return KvClaims.FromString(handle.claims)


def failures(metrics: Metrics) -> dict[str, float]:
    """zipserve_kv_handoff_failures by reason, without zeros."""
    return {
        sample.labels["reason"]: sample.value
        for metric in metrics.handoff_failures.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.value
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Value of a metric."""
    return metrics.registry.get_sample_value(name, labels) or 0.0


GoAway = Callable[["asyncio.Task[Any]"], None]
"""How a caller leaves."""


def cancels(task: "asyncio.Task[Any]") -> None:
    """By cancelling."""
    task.cancel()


def waits(task: "asyncio.Task[Any]") -> None:
    """By its deadline, which will pass."""


def ways(deadline_s: float) -> list[Any]:
    """Parameters of a caller that goes away: how, its options, the error it sees, and the worker's settings."""
    default = {"deadline_default_s": deadline_s}
    return [
        pytest.param(cancels, {"timeout_s": 20.0}, asyncio.CancelledError, {}, id="cancel"),
        pytest.param(waits, {"timeout_s": deadline_s}, errors.DeadlineError, {}, id="deadline"),
        pytest.param(waits, {"timeout_s": None}, errors.DeadlineError, default, id="default-deadline"),
    ]


class Gate:
    """Holds a device's thread inside its next forward passes until it is opened."""

    def __init__(self, device: Device) -> None:
        self._open = threading.Event()
        self._entered = threading.Event()
        forward = device.engine.forward

        def gated(*args: Any) -> Any:
            self._entered.set()
            assert self._open.wait(20.0), "nobody opened the gate"
            return forward(*args)

        device.engine.forward = gated  # type: ignore[method-assign, assignment]

    async def entered(self) -> None:
        """Returns when the thread waits at the gate."""
        await until(self._entered.is_set, "the device is computing")

    def open(self) -> None:
        """Lets everything through from now on."""
        self._open.set()


@dataclass
class Prefill:
    """A running prefill worker and the stubs of its services."""

    service: PrefillService
    settings: PrefillSettings
    address: str
    stub: "PrefillServiceAsyncStub"
    transfer: "KvTransferServiceAsyncStub"
    channels: ChannelPool

    def request(self, prompt_ids: list[int], **changes: Any) -> PrefillRequest:
        """A request that is right, but for the changes."""
        fields = {
            "request_id": "r",
            "token_ids": prompt_ids,
            "sampling": GREEDY,
            "layout_fingerprint": self.service.device.layout.fingerprint,
        }
        return PrefillRequest(**{**fields, **changes})

    async def compute(self, tokens: int | list[int], timeout_s: float | None = 20.0, **changes: Any) -> PrefillResponse:
        """Computes a prompt; errors are those of our tree."""
        token_ids = tokens if isinstance(tokens, list) else prompt(tokens)
        with client_errors():
            return await self.stub.Prefill(self.request(token_ids, **changes), timeout=timeout_s)

    def free_lent(self, lease_id: bytes) -> None:
        """Frees the slabs of a lease that lives on: a worker that is wrong about its slabs."""
        source, now_s = self.service.source, time.monotonic()
        lease, _ = source._leases.release(lease_id, now_s)
        assert lease is not None
        source.on_free(lease.resource)
        source._leases.issue(lease_id, Slabs(), now_s)

    async def load(self) -> Load:
        """As GetCapabilities tells it."""
        return await _load(self.channels, self.address)

    async def settled(self) -> None:
        """Waits until nothing is held and nothing waits any more, and checks the books."""
        await until(lambda: _is_idle(self.service.load()), f"prefill is idle: {self.service.load()}".replace("\n", " "))
        self.service.scheduler.check_integrity()
        assert _is_idle(await self.load())


@dataclass
class Decode:
    """A running decode worker and its stub."""

    service: DecodeService
    settings: DecodeSettings
    address: str
    stub: "DecodeServiceAsyncStub"
    channels: ChannelPool

    def request(self, prefilled: PrefillResponse, tokens: int = 8, **changes: Any) -> DecodeRequest:
        """A request that is right, but for the changes."""
        fields = {
            "request_id": "r",
            "handle": prefilled.handle,
            "token_id": prefilled.token_id,
            "sampling": GREEDY,
            "max_new_tokens": tokens,
        }
        return DecodeRequest(**{**fields, **changes})

    async def events(
        self, prefilled: PrefillResponse, tokens: int = 8, timeout_s: float | None = 20.0, **changes: Any
    ) -> list[DecodeResponse]:
        """All events of a stream; errors are those of our tree."""
        with client_errors():
            call = self.stub.Decode(self.request(prefilled, tokens, **changes), timeout=timeout_s)
            return [event async for event in call]

    async def tokens(self, prefilled: PrefillResponse, tokens: int = 8, **changes: Any) -> list[int]:
        """All tokens of a stream, whose shape is checked: pulled, tokens at growing positions, finished."""
        events = await self.events(prefilled, tokens, **changes)
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["pulled", *["tokens"] * (len(kinds) - 2), "finished"]
        position = claims_of(prefilled.handle).tokens + 1
        token_ids: list[int] = []
        for event in events[1:-1]:
            assert event.tokens.position == position + len(token_ids)
            token_ids += event.tokens.token_ids
        return token_ids

    async def refused(self, prefilled: PrefillResponse, error: type[Exception], **changes: Any) -> Exception:
        """Sends a request that must fail before its first event, and returns the error."""
        call = self.stub.Decode(self.request(prefilled, **changes), timeout=20.0)
        events: list[DecodeResponse] = []

        async def read() -> None:
            with client_errors():
                async for event in call:
                    events.append(event)  # noqa: PERF401  the ones before the error count

        with pytest.raises(error) as raised:
            await read()
        assert type(raised.value) is error, f"{raised.value!r} is not exactly a {error.__name__}"
        assert events == [], "something was sent from KV that is not sound"
        return raised.value

    async def load(self) -> Load:
        """As GetCapabilities tells it."""
        return await _load(self.channels, self.address)

    async def settled(self) -> None:
        """Waits until nothing is held and nothing waits any more, and checks the books."""
        await until(lambda: _is_idle(self.service.load()), f"decode is idle: {self.service.load()}".replace("\n", " "))
        self.service.scheduler.check_integrity()
        assert self.service.scheduler.slots.free == self.service.scheduler.slots.count
        assert _is_idle(await self.load())


@dataclass
class Store:
    """A running KV store."""

    service: KvStoreService
    settings: KvStoreSettings
    address: str
    channels: ChannelPool

    async def has(self, names: list[bytes]) -> None:
        """Returns when all blocks of a sequence are in it, and on its disk if it has one."""

        def is_there() -> bool:
            store = self.service.store
            if store is None or store.count(names) < len(names):
                return False
            return store._disk is None or len(store._disk.find(names)) == len(names)

        await until(is_there, f"{len(names)} blocks are in the store")

    async def settled(self) -> None:
        """Waits until nothing is held any more, and checks the books."""
        await until(lambda: _is_idle(self.service.load()), "the store is idle")
        if self.service.store is not None:
            self.service.store.check_integrity()


@dataclass
class Pair:
    """One worker of each role."""

    prefill: Prefill
    decode: Decode

    async def settled(self) -> None:
        """Waits until both are back at their starting level."""
        await self.decode.settled()
        await self.prefill.settled()

    async def hand_over(self, tokens: int | list[int] = 40, new: int = 8) -> tuple[PrefillResponse, list[int]]:
        """The whole way, honestly."""
        prefilled = await self.prefill.compute(tokens)
        return prefilled, await self.decode.tokens(prefilled, new)


class Workers:
    """Starts workers of one cluster. When the context ends without an error, all must hold nothing any more."""

    def __init__(self, stack: AsyncExitStack, model: Path, redis_url: str, cluster: str) -> None:
        self._stack = stack
        self._common: dict[str, Any] = {
            "model": str(model),
            "redis_url": redis_url,
            "cluster": cluster,
            "secret": SECRET,
            "codec": "raw",
            "block_tokens": BLOCK,
            "kv_blocks": 24,
            "kv_tails": 6,
            "sequences_max": 4,
            "step_tokens": 256,  # measured, it would depend on what else the machine does
            "heartbeat_s": 0.05,
            "registry_ttl_s": 5.0,
            "drain_s": 5.0,
        }
        self.channels = ChannelPool(MESSAGE_BYTES_MAX, ClusterTokens(SECRET.encode()))

    async def prefill(
        self, open_transport: TransportFactory = NixlTransport, *, check: bool = True, **settings: Any
    ) -> Prefill:
        """Starts a prefill worker; it ends with the context."""
        return await self._stack.enter_async_context(self.a_prefill(open_transport, check=check, **settings))

    @asynccontextmanager
    async def a_prefill(
        self, open_transport: TransportFactory = NixlTransport, *, check: bool = True, **settings: Any
    ) -> AsyncIterator[Prefill]:
        """A prefill worker that ends when this context does."""
        # what is not given back must be missed before its lease ends
        own = PrefillSettings(**self._settings("prefill-0", {"lease_ttl_s": 60.0, **settings}))
        service = PrefillService(own, open_transport)
        async with running(service, own) as address:
            channel = self.channels.get(address)
            stub, transfer = PrefillServiceStub(channel), KvTransferServiceStub(channel)
            worker = Prefill(service, own, address, stub, transfer, self.channels)
            yield worker
            if check:
                await worker.settled()

    async def decode(
        self, open_transport: TransportFactory = NixlTransport, *, check: bool = True, **settings: Any
    ) -> Decode:
        """Starts a decode worker; it ends with the context."""
        return await self._stack.enter_async_context(self.a_decode(open_transport, check=check, **settings))

    @asynccontextmanager
    async def a_decode(
        self, open_transport: TransportFactory = NixlTransport, *, check: bool = True, **settings: Any
    ) -> AsyncIterator[Decode]:
        """A decode worker that ends when this context does."""
        own = DecodeSettings(**self._settings("decode-0", settings))
        service = DecodeService(own, open_transport)
        async with running(service, own) as address:
            worker = Decode(service, own, address, DecodeServiceStub(self.channels.get(address)), self.channels)
            yield worker
            if check:
                await worker.settled()

    async def kvstore(self, open_transport: TransportFactory = NixlTransport, **settings: Any) -> Store:
        """Starts a KV store; it ends with the context."""
        return await self._stack.enter_async_context(self.a_kvstore(open_transport, **settings))

    @asynccontextmanager
    async def a_kvstore(
        self, open_transport: TransportFactory = NixlTransport, *, check: bool = True, **settings: Any
    ) -> AsyncIterator[Store]:
        """A KV store that ends when this context does."""
        shared = ("redis_url", "cluster", "secret", "heartbeat_s", "registry_ttl_s", "drain_s")
        common = {name: self._common[name] for name in shared}
        own = KvStoreSettings(**{**common, "worker_id": "kvstore-0", "lease_ttl_s": 60.0, **settings})
        service = KvStoreService(own, open_transport)
        async with running(service, own) as address:
            store = Store(service, own, address, self.channels)
            yield store
            if check:
                await store.settled()

    async def pair(
        self,
        open_transport: TransportFactory = NixlTransport,
        *,
        prefill: Mapping[str, Any] | None = None,
        decode: Mapping[str, Any] | None = None,
    ) -> Pair:
        """Starts one worker of each role, with settings of their own."""
        one = await self.prefill(open_transport, **(prefill or {}))
        return Pair(one, await self.decode(open_transport, **(decode or {})))

    def _settings(self, worker_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._common, "worker_id": worker_id, **changes}


@asynccontextmanager
async def workers(model: Path, redis_url: str, cluster: str) -> AsyncIterator[Workers]:
    """Workers of a cluster of their own, ended in reverse order."""
    async with AsyncExitStack() as stack:
        all_workers = Workers(stack, model, redis_url, cluster)
        stack.push_async_callback(all_workers.channels.close)
        yield all_workers


async def health(channels: ChannelPool, address: str, service: str) -> bool:
    """Whether a server calls one of its services SERVING."""
    stub: Any = health_pb2_grpc.HealthStub(channels.get(address))
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _load(channels: ChannelPool, address: str) -> Load:
    answer = await WorkerServiceStub(channels.get(address)).GetCapabilities(GetCapabilitiesRequest(), timeout=5.0)
    return answer.load


def _is_idle(load: Load) -> bool:
    busy = (load.queued_requests, load.queued_tokens, load.running_requests, load.parked_requests, load.leases)
    pools = (
        (load.free_blocks, load.total_blocks),
        (load.free_tails, load.total_tails),
        (load.free_sinks, load.total_sinks),
    )
    return not any(busy) and all(free == total for free, total in pools)
