"""The KV store alone: every RPC and every refusal. Before it has seen a worker, it holds nothing."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from inprocess import SECRET, running
from polling import until
from workers import MESSAGE_BYTES_MAX, health
from zipserve.common import errors
from zipserve.common.registry import RegistryView
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.door import ClusterTokens
from zipserve.common.rpc.status import client_errors
from zipserve.kvstore.config import KvStoreSettings
from zipserve.kvstore.service import KvStoreService
from zipserve.v1.kv_store_service_pb2 import LookupRequest, PinRequest, ReleaseRequest
from zipserve.v1.kv_store_service_pb2_grpc import KvStoreServiceStub
from zipserve.v1.worker_service_pb2 import GetCapabilitiesRequest, Load, WorkerRole
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:  # the name exists in the stubs only
    from zipserve.v1.kv_store_service_pb2_grpc import KvStoreServiceAsyncStub

FINGERPRINT, HASH = b"f" * 32, b"h" * 32
SERVICES = ("", "zipserve.v1.KvStoreService", "zipserve.v1.KvTransferService", "zipserve.v1.WorkerService")


class Store:
    """A running store."""

    def __init__(self, settings: KvStoreSettings, service: KvStoreService, address: str, channels: ChannelPool) -> None:
        self.settings, self.service, self.address, self.channels = settings, service, address, channels
        self.channel: Any = channels.get(address)
        self.stub: KvStoreServiceAsyncStub = KvStoreServiceStub(channels.get(address))


@pytest.fixture
async def store(redis_url: str, cluster: str) -> AsyncIterator[Store]:
    settings = KvStoreSettings.model_validate(
        {"redis_url": redis_url, "cluster": cluster, "secret": SECRET, "worker_id": "kvstore-0", "heartbeat_s": 0.05}
    )
    service = KvStoreService(settings)
    tokens = ClusterTokens(settings.secret_bytes)
    async with ChannelPool(MESSAGE_BYTES_MAX, tokens) as channels, running(service, settings) as address:
        yield Store(settings, service, address, channels)


@pytest.mark.parametrize("hashes", [0, 1, 65_536])
async def test_lookup_and_pin_hold_nothing(hashes: int, store: Store) -> None:
    names = [HASH] * hashes
    found = await store.stub.Lookup(LookupRequest(layout_fingerprint=FINGERPRINT, prefix_hashes=names), timeout=5)
    assert found.blocks == 0
    pinned = await store.stub.Pin(PinRequest(layout_fingerprint=FINGERPRINT, prefix_hashes=names), timeout=5)
    assert pinned.blocks == 0
    assert not pinned.HasField("handle"), "a lease over nothing"


async def test_release_of_an_unknown_lease_succeeds(store: Store) -> None:
    answer = await store.stub.Release(ReleaseRequest(lease_id=b"x" * 16), timeout=5)
    assert not answer.HasField("held")


@pytest.mark.parametrize("method", ["Lookup", "Pin"])
@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"layout_fingerprint": b""}, "layout_fingerprint", "has 0 bytes, must have 32"),
        ({"layout_fingerprint": b"f" * 31}, "layout_fingerprint", "has 31 bytes, must have 32"),
        ({"prefix_hashes": [HASH, b""]}, "prefix_hashes", "a hash has 0 bytes, must have 32"),
        ({"prefix_hashes": [HASH, b"h" * 16]}, "prefix_hashes", "a hash has 16 bytes, must have 32"),
        ({"prefix_hashes": [HASH] * 65_537}, "prefix_hashes", "65537 hashes were given, at most 65536"),
    ],
)
async def test_a_request_that_is_wrong(
    fields: dict[str, Any], field: str, message: str, method: str, store: Store
) -> None:
    kind: Any = {"Lookup": LookupRequest, "Pin": PinRequest}[method]
    request = kind(**{"layout_fingerprint": FINGERPRINT, "prefix_hashes": [HASH], **fields})
    with pytest.raises(errors.InvalidRequestError, match=message) as raised, client_errors():
        await getattr(store.stub, method)(request, timeout=5)
    assert raised.value.field == field


@pytest.mark.parametrize("lease_id", [b"", b"x" * 15, b"x" * 17])
async def test_a_lease_id_that_is_wrong(lease_id: bytes, store: Store) -> None:
    message = f"has {len(lease_id)} bytes, must have 16"
    with pytest.raises(errors.InvalidRequestError, match=message), client_errors():
        await store.stub.Release(ReleaseRequest(lease_id=lease_id), timeout=5)


@pytest.mark.parametrize("method", ["Lookup", "Pin", "Release"])
async def test_bytes_that_are_no_message(method: str, store: Store) -> None:
    with pytest.raises(errors.InvalidRequestError, match="not a valid message"), client_errors():
        await store.channel.unary_unary(f"/zipserve.v1.KvStoreService/{method}")(b"\xff\xff", timeout=5)


async def test_a_message_that_is_too_large(store: Store) -> None:
    request = LookupRequest(layout_fingerprint=FINGERPRINT, prefix_hashes=[b"x" * 10_000_000])
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await store.stub.Lookup(request, timeout=5)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_its_face(store: Store) -> None:
    answer = await WorkerServiceStub(store.channel).GetCapabilities(GetCapabilitiesRequest(), timeout=5)
    facts = answer.capabilities
    assert (facts.worker_id, facts.role, facts.address) == ("kvstore-0", WorkerRole.WORKER_ROLE_KVSTORE, store.address)
    assert facts.incarnation
    assert answer.load == Load()
    for name in SERVICES:
        assert await health(store.channels, store.address, name)
    async with RegistryView(store.settings) as view:
        await until(lambda: len(view.workers(WorkerRole.WORKER_ROLE_KVSTORE)) == 1, "it is in the registry")
        assert view.workers(WorkerRole.WORKER_ROLE_KVSTORE)[0].capabilities == facts


async def test_draining(store: Store) -> None:
    store.service.begin_drain()
    answer = await WorkerServiceStub(store.channel).GetCapabilities(GetCapabilitiesRequest(), timeout=5)
    assert answer.load == Load(draining=True)
    await store.service.drained()
