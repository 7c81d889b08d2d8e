"""One trace per request over all hops, as a collector gets it: real services, real NIXL, real OTLP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from structlog.testing import capture_logs

from hooked_nixl import Hooks
from inprocess import SECRET, running
from otlp_collector import Collector, collecting
from polling import until
from streams import Stub, collect, request
from workers import BLOCK, Pair, Workers, prompt, value, workers
from zipserve.common import telemetry
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.router.config import RouterSettings
from zipserve.router.service import RouterService

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = [("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"), ("x-request-id", "request-7")]
GENERATE = "zipserve.v1.InferenceService/Generate"
PREFILL = {"zipserve.v1.PrefillService/Prefill": ["queue", {"compute": ["seal"]}]}
PULL = {"kv.pull": ["kv.connect", "kv.transfer", "kv.verify"]}
DECODE = {"zipserve.v1.DecodeService/Decode": ["queue", PULL, "decode"]}
LEASES = "zipserve.v1.KvTransferService"
"""Renewals come when it is time for them."""


@dataclass
class Traced:
    """A stack whose spans go to a collector, which has them all when the context is left."""

    collector: Collector
    pair: Pair
    stub: Stub
    router: RouterService
    workers: Workers


@asynccontextmanager
async def traced(model: Path, redis_url: str, cluster: str, hooks: Hooks, **decode: Any) -> AsyncIterator[Traced]:
    values = {"model": str(model), "redis_url": redis_url, "cluster": cluster, "secret": SECRET, "heartbeat_s": 0.05}
    async with AsyncExitStack() as stack:
        collector = stack.enter_context(collecting())
        settings = RouterSettings.model_validate(
            {**values, "otlp_endpoint": collector.endpoint, "http_listen": "127.0.0.1:0"}
        )
        stack.enter_context(telemetry.exporting("test", settings))
        started = await stack.enter_async_context(workers(model, redis_url, cluster))
        pair = await started.pair(hooks.open, decode=decode)
        router = RouterService(settings)
        address = await stack.enter_async_context(running(router, settings))
        yield Traced(collector, pair, Stub(started.channels.get(address)), router, started)
        await pair.settled()


async def test_a_request_is_one_trace(tiny_model: Path, redis_url: str, cluster: str) -> None:
    async with traced(tiny_model, redis_url, cluster, Hooks()) as stack:
        with capture_logs() as lines:
            async for _ in stack.stub.Generate(request(prompt(40), 12), metadata=CALLER, timeout=60):
                pass
            await until(lambda: any(line["event"] == "request.finished" for line in lines), "it is logged")
    seen = stack.collector
    generate = seen.one(GENERATE)
    assert seen.tree(generate, without=LEASES) == {
        GENERATE: ["tokenize", "route", {"attempt": [{"prefill": [PREFILL]}, {"decode": [DECODE]}]}]
    }
    ours = [span for span in seen.spans if span.trace_id == TRACE_ID]
    assert (generate.trace_id, generate.parent_id.hex()) == (TRACE_ID, "b7ad6b7169203331")
    assert len(ours) >= 14
    assert not any(span.failed for span in ours)
    told = {key: generate.attributes[f"zipserve.{key}"] for key in ("request_id", "outcome", "prompt_tokens")}
    assert told == {"request_id": "request-7", "outcome": "OK", "prompt_tokens": 40}
    assert generate.attributes["zipserve.completion_tokens"] == 12
    assert (generate.attributes["zipserve.prefill_worker"], generate.attributes["zipserve.replays"]) == ("prefill-0", 0)
    assert generate.attributes["zipserve.kv_bytes"] == seen.one("kv.pull").attributes["zipserve.kv.bytes"] > 0
    assert " raw block 16 " in seen.one("prefill").attributes["zipserve.layout"]
    decoding = next(span for span in seen.named("decode") if span.events)
    assert decoding.events == ("first_token",)
    assert all(span.start_ns <= span.end_ns for span in ours)
    by_id = {span.span_id: span for span in ours}
    for span in ours:  # what was recorded afterwards lies within what it is part of
        parent = by_id.get(span.parent_id)
        assert parent is None or parent.start_ns - 1_000_000 <= span.start_ns
    (line,) = [line for line in lines if line["event"] == "request.finished"]
    assert line["trace_id"] == TRACE_ID


async def test_a_request_over_http_is_one_trace(tiny_model: Path, redis_url: str, cluster: str) -> None:
    async with traced(tiny_model, redis_url, cluster, Hooks()) as stack, httpx.AsyncClient() as client:
        url = f"http://{stack.router.http_address}/v1/completions"
        body = {"model": tiny_model.name, "prompt": prompt(40), "max_tokens": 12, "stream": True}
        answer = await client.post(url, json=body, headers=dict(CALLER), timeout=60)
        assert answer.status_code == 200, answer.text
        refused = await client.post(url, json={**body, "model": "other"}, headers=dict(CALLER), timeout=60)
        assert refused.status_code == 404
    seen = stack.collector
    done, failed = seen.named("POST /v1/completions")
    assert done.trace_id == failed.trace_id == TRACE_ID
    assert seen.tree(done, without=LEASES) == {
        "POST /v1/completions": ["tokenize", "route", {"attempt": [{"prefill": [PREFILL]}, {"decode": [DECODE]}]}]
    }
    assert (done.failed, done.attributes["zipserve.api"]) == (False, "http")
    assert (failed.failed, failed.attributes["error.type"]) == (True, "MODEL_NOT_FOUND")


async def test_a_replayed_request_is_one_trace(tiny_model: Path, redis_url: str, cluster: str) -> None:
    hooks = Hooks()
    broken: list[str] = []
    async with traced(tiny_model, redis_url, cluster, hooks) as stack:

        async def flip() -> None:
            if not broken:
                broken.append("a bit")
                prefill = stack.pair.prefill.service
                ((_, lease),) = prefill.source._leases._leases.items()
                prefill.device.slab_view(SlabKind.BLOCK, lease.resource.blocks[1])[1000] ^= 4

        hooks.before = flip
        answer = await collect(stack.stub, request(prompt(40), 12))
        assert answer.finished.usage.replays == 1
    seen = stack.collector
    generate = seen.one(GENERATE)
    first, second = seen.named("attempt")
    assert [span.parent_id for span in (first, second)] == [generate.span_id] * 2
    assert len({span.trace_id for span in seen.spans if span.name in (GENERATE, "attempt", "kv.pull", "compute")}) == 1
    assert (first.failed, first.attributes["zipserve.outcome"]) == (True, "BLOCK_CORRUPT")
    assert not second.failed
    failed = {"zipserve.v1.DecodeService/Decode": ["queue", PULL]}
    assert seen.tree(first, without=LEASES) == {"attempt": [{"prefill": [PREFILL]}, {"decode": [failed]}]}
    assert [span.failed for span in seen.named("kv.verify")] == [True, False]
    assert "exception" in seen.named("kv.verify")[0].events
    assert (generate.failed, generate.attributes["zipserve.replays"]) == (False, 1)


async def test_a_cancelled_request_is_a_trace_that_ends_with_it(tiny_model: Path, redis_url: str, cluster: str) -> None:
    async with traced(tiny_model, redis_url, cluster, Hooks()) as stack:
        call = stack.stub.Generate(request(prompt(40), 300), metadata=CALLER, timeout=60)
        async for response in call:
            if response.HasField("delta") and response.delta.index >= 3:
                break
        call.cancel()
        await until(lambda: not stack.router.load().running_requests, "the router has noticed")
    seen = stack.collector
    generate, decode = seen.one(GENERATE), seen.one("zipserve.v1.DecodeService/Decode")
    assert generate.attributes["zipserve.outcome"] == "CANCELLED"
    assert decode.attributes["zipserve.outcome"] == "CANCELLED"
    assert seen.one("attempt").attributes["zipserve.outcome"] == "CANCELLED"
    assert not any(span.failed for span in seen.spans if span.trace_id == TRACE_ID)
    assert {span.trace_id for span in (generate, decode)} == {TRACE_ID}


async def test_a_fetch_that_serves_two_requests_has_links_from_both(
    tiny_model: Path, redis_url: str, cluster: str
) -> None:
    hooks = Hooks()
    async with traced(tiny_model, redis_url, cluster, hooks) as stack:
        first = stack.pair.prefill
        other = await stack.workers.prefill(hooks.open, worker_id="prefill-1", fetch_s=20.0)
        shared = prompt(3 * BLOCK)
        done = await first.compute([*shared, 7])
        first.service.source.release_handle(done.handle)
        layout = first.service.device.layout
        names = prefix_hashes(shared, BLOCK, chain_salt(layout.fingerprint, ""))
        await until(lambda: bool(other.service.peers.holders.runs(names)), "it has heard of them")
        both = asyncio.Event()

        async def wait_for_both() -> None:
            await both.wait()

        hooks.before = wait_for_both
        one = asyncio.create_task(other.compute([*shared, 8]))
        await until(lambda: len(other.service.peers.fetcher._coming) > 0, "it fetches")
        two = asyncio.create_task(other.compute([*shared, 9]))
        await until(lambda: other.service.scheduler.queued_requests == 2, "both wait for it")
        both.set()
        for answer in await asyncio.gather(one, two):
            other.service.source.release_handle(answer.handle)
        assert value(other.service.metrics, "zipserve_kv_prefix_fetches_total", outcome="fetched") == 1
    seen = stack.collector
    fetch = seen.one("kv.fetch")
    owner = next(span for span in seen.spans if span.span_id == fetch.parent_id)
    (linked,) = [span for span in seen.spans if fetch.span_id in span.links]
    assert {owner.name, linked.name} == {"zipserve.v1.PrefillService/Prefill"}
    assert owner.span_id != linked.span_id
    assert owner.trace_id != linked.trace_id
    pin = seen.one("zipserve.v1.KvStoreService/Pin")
    assert (pin.parent_id, fetch.attributes["zipserve.kv.found"]) == (fetch.span_id, "fetched")
