"""Who may call what, over real gRPC: clients by their keys, services of a cluster by its secret, outsiders nothing."""

import asyncio
import json
import ssl
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from inprocess import SECRET, running
from polling import until
from router_cluster import Cluster, answer, build, explain, refusal
from zipserve.common import api_keys
from zipserve.common.models import ModelFiles
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.door import ClusterTokens
from zipserve.router.config import RouterSettings
from zipserve.router.service import RouterService
from zipserve.v1.inference_service_pb2 import DESCRIPTOR, ListModelsRequest
from zipserve.v1.sampling_pb2 import StopConditions
from zipserve.v1.worker_service_pb2 import GetCapabilitiesRequest
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

KEY, STOP = api_keys.draw(), StopConditions(max_tokens=5)
SHOWN = [("authorization", f"Bearer {KEY}")]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(api_keys.line(KEY, "alice", cache_salt="a", priority_max=0, requests_max=1))
    return path


@pytest.fixture
async def guarded(stack: AsyncExitStack, model: ModelFiles, redis_url: str, keys_file: Path) -> Cluster:
    """A router that asks for keys."""
    return await build(stack, model, redis_url, keys_file=str(keys_file), reflection=True)


async def test_a_key_opens_the_door(guarded: Cluster) -> None:
    prefill = await guarded.add("p0")
    await guarded.add("d0")
    with capture_logs() as logs:
        result = await answer(guarded.generate(stop=STOP, metadata=SHOWN, priority=9, cache_salt="b"))
    assert len(result.token_ids) == 5
    assert (prefill.requests[0].priority, prefill.requests[0].cache_salt) == (0, "1:ab")
    (line,) = [line for line in logs if line["event"] == "request.finished"]
    assert line["caller"] == "alice"
    assert KEY not in json.dumps(logs, default=str)
    assert all("authorization" not in metadata for metadata in prefill.metadata), "keys stay at the router"


async def test_a_caller_has_its_own_limit(guarded: Cluster) -> None:
    call = guarded.generate(stop=STOP, metadata=SHOWN)  # without workers it waits
    assert (await anext(aiter(call))).WhichOneof("event") == "started"
    refused = await refusal(guarded.generate(stop=STOP, metadata=SHOWN))
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refused.message == "1 requests of key 'alice' are in flight, 1 is its limit"
    assert refused.retry_s is not None
    call.cancel()


@pytest.mark.parametrize("metadata", [None, [("authorization", "Bearer wrong")], [("authorization", KEY)]])
async def test_without_a_key_every_method_is_closed(guarded: Cluster, metadata: Any) -> None:
    for service in DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            channel: Any = guarded.channel
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = make(f"/{service.full_name}/{method.name}")(b"", metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (anext(aiter(call)) if method.server_streaming else call)
            assert (explain(caught.value).reason, caught.value.code()) == (
                "UNAUTHENTICATED",
                grpc.StatusCode.UNAUTHENTICATED,
            )
            assert KEY not in (caught.value.details() or "")


async def test_reflection_needs_a_key_and_health_none(guarded: Cluster) -> None:
    channel: Any = guarded.channel
    reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(reflect.ServerReflectionInfo(iter(asked))))
    assert explain(caught.value).reason == "UNAUTHENTICATED"
    told = await anext(aiter(reflect.ServerReflectionInfo(iter(asked), metadata=SHOWN)))
    assert "zipserve.v1.InferenceService" in {service.name for service in told.list_services_response.service}
    health: Any = health_pb2_grpc.HealthStub(guarded.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_keys_are_exchanged_while_it_runs(guarded: Cluster, keys_file: Path) -> None:
    other = api_keys.draw()
    await asyncio.to_thread(keys_file.write_text, api_keys.line(other, "bob"))
    await until(lambda: other_is_known(guarded, other), "the new key is known")
    await guarded.stub.ListModels(ListModelsRequest(), metadata=[("authorization", f"Bearer {other}")])
    with pytest.raises(grpc.aio.AioRpcError):
        await guarded.stub.ListModels(ListModelsRequest(), metadata=SHOWN)


def other_is_known(cluster: Cluster, key: str) -> bool:
    return api_keys.digest(key) in cluster.service._keys._keys


async def test_a_router_that_is_open_to_the_world_says_so(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    with capture_logs() as logs:
        await build(stack, model, redis_url)
        assert "access.open" not in {line["event"] for line in logs}
        await build(stack, model, redis_url, listen="0.0.0.0:0", advertise_host="127.0.0.1")
    (line,) = [line for line in logs if line["event"] == "access.open"]
    assert line["log_level"] == "warning"


async def test_workers_let_in_their_own_cluster_only(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url)
    worker = await cluster.add("p0")
    for tokens in (None, ClusterTokens(b"the secret of others")):
        channels = await stack.enter_async_context(ChannelPool(1 << 20, tokens))
        for service, methods in (("Prefill", ("Prefill", "ReleaseHandle")), ("Worker", ("GetCapabilities",))):
            for method in methods:
                channel: Any = channels.get(worker.address)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/zipserve.v1.{service}Service/{method}")(b"")
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    own = await stack.enter_async_context(ChannelPool(1 << 20, ClusterTokens(cluster.settings.secret_bytes)))
    answer = await WorkerServiceStub(own.get(worker.address)).GetCapabilities(GetCapabilitiesRequest())
    assert answer.capabilities.worker_id == "p0"
    assert worker.requests == []


async def test_http_asks_for_the_same_keys_over_tls(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str, keys_file: Path, tmp_path: Path
) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "key"))
    tls = {"public_tls_cert": str(tmp_path / "cert"), "public_tls_key": str(tmp_path / "key")}
    service = RouterService(
        settings := RouterSettings.model_validate(
            {
                "cluster": uuid.uuid4().hex,
                "redis_url": redis_url,
                "secret": SECRET,
                "model": str(model.folder),
                "keys_file": str(keys_file),
                "http_listen": "127.0.0.1:0",
                **tls,
            }
        )
    )
    await stack.enter_async_context(running(service, settings))
    trust = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    async with httpx.AsyncClient(verify=trust, base_url=f"https://{service.http_address}") as client:
        assert (await client.get("/health")).status_code == 200
        for path in ("/v1/models", "/metrics"):
            refused = await client.get(path, headers={"authorization": "Bearer wrong"})
            assert refused.status_code == 401
            assert KEY not in refused.text
            assert (await client.get(path, headers=dict(SHOWN))).status_code == 200
