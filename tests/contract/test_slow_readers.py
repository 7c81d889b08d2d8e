"""Clients that stop reading: nothing is held for them for long, and others do not notice. Over real gRPC, from windows
that hold a few events."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

import router_model
from inprocess import SECRET, running
from polling import until
from router_cluster import Cluster, answer, build, refusal
from router_peers import Peer
from streams import Stub, collect, request
from workers import Workers, prompt
from zipserve.common.models import resolve
from zipserve.common.rpc import interceptor
from zipserve.router.config import RouterSettings
from zipserve.router.service import RouterService
from zipserve.v1.inference_service_pb2 import GenerateRequest
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions

LONG = 1 << 23
SLOW_READER_S = 0.4
# no probing of the bandwidth, which would widen the window, and no sharing of connections
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
async def fast(stack: AsyncExitStack, tmp_path: Path, redis_url: str) -> tuple[Cluster, Peer]:
    """See `build_fast`."""
    return await build_fast(stack, tmp_path, redis_url, SLOW_READER_S)


async def build_fast(
    stack: AsyncExitStack, tmp_path: Path, redis_url: str, slow_reader_s: float
) -> tuple[Cluster, Peer]:
    """A router and workers that make far more tokens than any buffer between them and the client holds."""
    model = resolve(str(router_model.write(tmp_path / "long", context_tokens=1 << 24)))
    limits = {"completion_tokens_max": LONG, "queue_tokens_max": 1 << 30, "slow_reader_s": slow_reader_s}
    cluster = await build(stack, model, redis_url, **limits)
    await cluster.add("p0", context_tokens=1 << 24)
    return cluster, await cluster.add("d0", context_tokens=1 << 24, tokens_per_event=4000)


async def stalled(address: str, stack: AsyncExitStack, message: GenerateRequest) -> Any:
    """A call over a connection of its own, of which the first event has been read, and nothing more will be."""
    stub: Any = InferenceServiceStub(
        await stack.enter_async_context(grpc.aio.insecure_channel(address, options=NARROW))
    )
    call = stub.Generate(message)
    assert (await anext(aiter(call))).WhichOneof("event") == "started"
    return call


async def test_a_client_that_reads_again_learns_why(fast: tuple[Cluster, Peer], stack: AsyncExitStack) -> None:
    cluster, decode = fast
    endless = request([3] * 10, LONG)
    started_s = time.monotonic()
    call = await stalled(cluster.address, stack, endless)
    async with asyncio.timeout(10):
        await decode.cancelled.wait()
    assert time.monotonic() - started_s > SLOW_READER_S
    await cluster.at_rest()
    refused = await refusal(call)
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")
    assert "has read nothing for 0.4 s" in refused.message


async def test_a_client_that_never_reads_again(
    fast: tuple[Cluster, Peer], stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call ends on our side all the same."""
    monkeypatch.setattr(interceptor, "_ABORT_S", 0.1)
    cluster, _ = fast
    await stalled(cluster.address, stack, request([3] * 10, LONG))
    labels = {"method": "/zipserve.v1.InferenceService/Generate", "reason": "SLOW_READER"}
    rpcs = cluster.service.metrics.registry.get_sample_value
    await until(lambda: rpcs("zipserve_rpcs_total", labels) == 1, "the call has ended")


async def test_who_reads_slowly_but_reads(fast: tuple[Cluster, Peer], stack: AsyncExitStack) -> None:
    """What counts is the time since something was read, not how long it all takes."""
    cluster, decode = fast
    call = await stalled(cluster.address, stack, request([3] * 10, 400_000))
    started_s, tokens = time.monotonic(), 0
    async for event in call:
        tokens += len(event.delta.token_ids)
        if time.monotonic() - started_s < 2 * SLOW_READER_S:
            await asyncio.sleep(SLOW_READER_S / 4)  # the slowness is the point
    assert tokens == 400_000
    assert not decode.cancelled.is_set()


async def test_others_go_on_meanwhile(stack: AsyncExitStack, tmp_path: Path, redis_url: str) -> None:
    cluster, _ = await build_fast(stack, tmp_path, redis_url, slow_reader_s=60.0)
    calls = [await stalled(cluster.address, stack, request([3] * 10, LONG)) for _ in range(3)]
    for _ in range(3):
        assert len((await answer(cluster.generate(stop=StopConditions(max_tokens=9)))).token_ids) == 9
    assert cluster.frontend.requests == len(calls)
    for call in calls:
        call.cancel()
    await cluster.at_rest()


async def test_real_workers_are_free_within_a_second(
    cluster_workers: Workers, tiny_model: Path, redis_url: str, cluster: str, stack: AsyncExitStack
) -> None:
    """Blocks of a stalled stream come back, while those of a stream that is read are computed on."""
    pair = await cluster_workers.pair(decode={"kv_blocks": 300})
    values = {"model": str(tiny_model), "redis_url": redis_url, "cluster": cluster, "secret": SECRET}
    settings = RouterSettings.model_validate({**values, "heartbeat_s": 0.05, "slow_reader_s": SLOW_READER_S})
    router = RouterService(settings)
    async with running(router, settings) as address:
        endless = request(prompt(40), 4000)
        endless.sampling.MergeFrom(SamplingParams(logprobs=20))
        call = await stalled(address, stack, endless)
        load = pair.decode.service.load
        await until(lambda: load().running_requests == 1, "it is being continued")
        other = await collect(Stub(cluster_workers.channels.get(address)), request(prompt(40), 50))
        assert len(other.token_ids) == 50
        await until(lambda: router.load().running_requests == 0, "the stalled request is given up")
        assert load().total_blocks == 300
        await until(lambda: load().free_blocks == 300, "all blocks are free", timeout_s=1.0)
        assert (await refusal(call)).reason == "SLOW_READER"
