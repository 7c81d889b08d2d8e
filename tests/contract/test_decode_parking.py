"""A decode worker with fewer KV blocks than its sequences come to need: the younger ones make room, and come back."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from workers import BLOCK, Decode, Gate, Pair, Workers, prompt, value
from zipserve.common import errors
from zipserve.v1.decode_service_pb2 import DecodeResponse
from zipserve.v1.prefill_service_pb2 import PrefillResponse

NEW = 5 * BLOCK
"""Tokens of each stream, of a prompt of less than two blocks: up to seven blocks, of the nine that there are."""
TIGHT: dict[str, Any] = {"kv_blocks": 9, "sequences_max": 4}
ZIPPED: dict[str, Any] = {"codec": "zip-4/32", "block_tokens": 64}


@pytest.fixture
async def pair(cluster_workers: Workers) -> Pair:
    return await cluster_workers.pair(Fabric().open, decode=TIGHT)


def start(decode: Decode, prefilled: PrefillResponse, tokens: int = NEW) -> "asyncio.Task[list[DecodeResponse]]":
    return asyncio.create_task(decode.events(prefilled, tokens))


def parkings(pair: Pair) -> float:
    return value(pair.decode.service.metrics, "zipserve_parkings_total")


async def test_parked_streams_go_on_with_the_right_tokens(pair: Pair, tiny_model: Path) -> None:
    prompts = [prompt(20 + 3 * i, salt=i) for i in range(4)]
    prefilled = [await pair.prefill.compute(token_ids) for token_ids in prompts]
    answers = await asyncio.gather(*(pair.decode.tokens(one, NEW) for one in prefilled))
    oracle = Oracle(tiny_model)
    for token_ids, one, tokens in zip(prompts, prefilled, answers, strict=True):
        assert len(tokens) == NEW
        assert oracle.first_wrong(token_ids, [one.token_id, *tokens]) is None
    assert parkings(pair) >= 2
    assert value(pair.decode.service.metrics, "zipserve_parked_requests") == 0
    assert value(pair.decode.service.metrics, "zipserve_parked_bytes") == 0
    await pair.settled()


async def test_zipped_streams_are_those_of_an_idle_worker(cluster_workers: Workers) -> None:
    """Blocks, sinks and scores come back, too."""
    pair = await cluster_workers.pair(
        Fabric().open, prefill={**ZIPPED, "prefix_blocks_max": 0}, decode={**ZIPPED, "kv_blocks": 5, "sequences_max": 3}
    )
    prompts = [prompt(100 + 3 * i, salt=i) for i in range(3)]
    alone = [(await pair.hand_over(token_ids, 200))[1] for token_ids in prompts]
    assert parkings(pair) == 0
    prefilled = [await pair.prefill.compute(token_ids) for token_ids in prompts]
    together = await asyncio.gather(*(pair.decode.tokens(one, 200) for one in prefilled))
    assert parkings(pair) >= 1
    assert together == alone


async def test_the_oldest_goes_on_and_the_youngest_fails_where_nobody_can_be_parked(cluster_workers: Workers) -> None:
    pair = await cluster_workers.pair(Fabric().open, decode={**TIGHT, "parked_bytes_max": 0})
    gate = Gate(pair.decode.service.device)
    old = start(pair.decode, await pair.prefill.compute(20))
    await gate.entered()
    young = start(pair.decode, await pair.prefill.compute(20))
    await until(lambda: pair.decode.service.load().running_requests == 2, "both run")
    gate.open()
    with pytest.raises(errors.OverloadedError, match="memory for parked sequences"):
        await young
    assert sum(len(event.tokens.token_ids) for event in await old) == NEW
    await pair.settled()


async def test_a_parked_stream_that_nobody_wants_any_more_leaves(pair: Pair) -> None:
    gate = Gate(pair.decode.service.device)
    old = start(pair.decode, await pair.prefill.compute(20))
    await gate.entered()
    young = start(pair.decode, await pair.prefill.compute(20))
    await until(lambda: pair.decode.service.load().running_requests == 2, "both run")
    gate.open()
    await until(lambda: pair.decode.service.load().parked_requests == 1, "the younger one is parked")
    young.cancel()
    await asyncio.gather(young, return_exceptions=True)
    await until(lambda: pair.decode.service.load().parked_requests == 0, "it has left")
    assert value(pair.decode.service.metrics, "zipserve_parked_bytes") == 0
    assert sum(len(event.tokens.token_ids) for event in await old) == NEW
    await pair.settled()


async def test_a_failing_copy_fails_its_own_sequence_only(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("out of luck")

    monkeypatch.setattr("zipserve.decode.batch.park", fail)
    prefilled = [await pair.prefill.compute(20) for _ in range(2)]
    results = await asyncio.gather(*(pair.decode.events(one, NEW) for one in prefilled), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["UnavailableError", "list"]
    await pair.settled()


async def test_a_lease_that_is_lost_in_the_queue_is_noticed_there(cluster_workers: Workers) -> None:
    """Not only when its turn comes."""
    pair = await cluster_workers.pair(Fabric().open, prefill={"lease_ttl_s": 0.3}, decode={"sequences_max": 1})
    gate = Gate(pair.decode.service.device)
    first = start(pair.decode, await pair.prefill.compute(20), 8)
    await gate.entered()
    waiting = await pair.prefill.compute(20)
    task = start(pair.decode, waiting, 8)
    await until(lambda: pair.decode.service.load().queued_requests == 1, "it waits")
    pair.prefill.service.source.release_handle(waiting.handle)
    with pytest.raises(errors.LeaseExpiredError):
        await task
    assert pair.decode.service.load().queued_requests == 0
    gate.open()
    await first
    await pair.settled()
