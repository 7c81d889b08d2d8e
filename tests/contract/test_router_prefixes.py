"""Prompts that begin alike go where their beginning is; tenants are told apart on every hop."""

import json
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router_cluster import Cluster, answer, build, refusal
from router_peers import Peer
from zipserve.common import tracing
from zipserve.common.models import ModelFiles
from zipserve.v1.inference_service_pb2 import TokenIds
from zipserve.v1.prefill_service_pb2 import PrefillRequest
from zipserve.v1.sampling_pb2 import StopConditions

BLOCK = 128


@pytest.fixture
async def peers(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> tuple[Cluster, list[Peer]]:
    """A router with two prefill workers, and these."""
    cluster = await build(stack, model, redis_url)
    prefills = [await cluster.add("p0", cached_tokens=BLOCK), await cluster.add("p1")]
    await cluster.add("d0")
    return cluster, prefills


async def ask(cluster: Cluster, token_ids: list[int], **request: Any) -> Any:
    return await answer(
        cluster.generate(token_ids=TokenIds(ids=token_ids), stop=StopConditions(max_tokens=2), **request)
    )


def asked(peer: Peer) -> list[list[int]]:
    return [list(request.token_ids) for request in peer.requests if isinstance(request, PrefillRequest)]


async def test_the_turns_of_a_chat_go_to_one_worker(peers: tuple[Cluster, list[Peer]]) -> None:
    cluster, prefills = peers
    for turn in range(1, 5):
        for chat in range(2):
            await ask(cluster, [chat + 3] * (BLOCK // 2 * turn + BLOCK))
    assert [len(asked(peer)) for peer in prefills] == [4, 4]
    assert all(len({token_ids[0] for token_ids in asked(peer)}) == 1 for peer in prefills)


async def test_short_prompts_take_turns(peers: tuple[Cluster, list[Peer]]) -> None:
    cluster, prefills = peers
    for _ in range(6):
        await ask(cluster, [3] * (BLOCK - 1))
    assert [len(asked(peer)) for peer in prefills] == [3, 3]


async def test_what_was_found_is_told(peers: tuple[Cluster, list[Peer]]) -> None:
    cluster, prefills = peers
    prefills[1].cached_tokens = BLOCK
    result = await ask(cluster, [3] * (2 * BLOCK))
    assert result.finished.usage.cached_prompt_tokens == BLOCK
    short = await ask(cluster, [4] * 5)
    assert short.finished.usage.cached_prompt_tokens == 5, "no more than there is of the prompt"


async def test_salts_reach_the_worker_and_part_the_prompts(peers: tuple[Cluster, list[Peer]]) -> None:
    cluster, prefills = peers
    for salt in ("a", "b", "a", "b"):
        await ask(cluster, [3] * (2 * BLOCK), cache_salt=salt)
    salts = [[request.cache_salt for request in peer.requests] for peer in prefills]
    assert salts == [["0:a", "0:a"], ["0:b", "0:b"]]


async def test_a_salt_that_is_too_long(peers: tuple[Cluster, list[Peer]]) -> None:
    cluster, _ = peers
    refused = await refusal(cluster.generate(cache_salt="x" * 257))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "cache_salt")
    assert "257 characters, at most 256" in refused.message


async def test_the_choice_is_explained(peers: tuple[Cluster, list[Peer]]) -> None:
    cluster, _ = peers
    await ask(cluster, [3] * (BLOCK + 1))
    with structlog.testing.capture_logs() as lines:
        await ask(cluster, [3] * (BLOCK + 5))
    (line,) = [line for line in lines if line["event"] == "route.scored"]
    assert (line["prefill_worker"], line["decode_worker"]) == ("p0", "d0")
    scores = [(score["worker_id"], score["first_token_tokens"]) for score in line["scores"]]
    assert scores == [("p0", 5), ("p1", BLOCK + 5)]


async def test_the_span_of_a_request_has_the_scores_of_its_route(
    peers: tuple[Cluster, list[Peer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    await ask(peers[0], [3] * (2 * BLOCK))
    routes = [json.loads(str(span.attributes["zipserve.route"])) for span in exporter.get_finished_spans()
              if span.attributes and "zipserve.route" in span.attributes]  # fmt: skip
    assert [(route["prefill_worker"], route["decode_worker"]) for route in routes] == [("p0", "d0")]
    assert [score["worker_id"] for score in routes[0]["scores"]] == ["p0", "p1"]
