"""A prefill worker that finds blocks of earlier prompts: what it reuses is right, counted, private, easily given up."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from workers import BLOCK, GREEDY, Gate, Pair, Prefill, Workers, claims_of, failures, prompt, value
from zipserve.common.kv.layout import SlabKind
from zipserve.v1.kv_pb2 import SLAB_KIND_BLOCK, SLAB_KIND_SINKS, KvClaims
from zipserve.v1.prefill_service_pb2 import PrefillResponse
from zipserve.v1.sampling_pb2 import SamplingParams

TOKENS = 5 * BLOCK + 7


@pytest.fixture
async def pair(cluster_workers: Workers) -> Pair:
    return await cluster_workers.pair(Fabric().open)


def count(worker: Prefill) -> list[int]:
    """Tokens of every step from now on."""
    steps: list[int] = []
    forward = worker.service.device.engine.forward

    def counted(segments: Any) -> Any:
        steps.append(sum(len(segment.token_ids) for segment in segments))
        return forward(segments)

    worker.service.device.engine.forward = counted  # type: ignore[method-assign]
    return steps


def blocks_of(claims: KvClaims) -> list[int]:
    return [ref.slab for ref in claims.refs if ref.kind == SLAB_KIND_BLOCK]


def give_up(worker: Prefill, *answers: PrefillResponse) -> None:
    for answer in answers:
        worker.service.source.release_handle(answer.handle)


def looked_for(worker: Prefill) -> tuple[float, float]:
    """Hits and misses so far, in blocks."""
    metrics = worker.service.metrics
    hits, misses = (value(metrics, "zipserve_kv_prefix_blocks_total", outcome=kind) for kind in ("hit", "miss"))
    return hits, misses


async def test_the_answer_is_the_one_without_reuse(pair: Pair, tiny_model: Path) -> None:
    """Token for token, whatever the prompts share: nothing, a part of a block, all of them but the last token."""
    oracle, steps = Oracle(tiny_model), count(pair.prefill)
    base = prompt(TOKENS)
    for shared, tokens, cached in (
        (TOKENS, TOKENS, 0),
        (TOKENS, TOKENS, 5),
        (0, TOKENS, 0),
        (TOKENS, TOKENS + 3 * BLOCK, 5),
        (3 * BLOCK + 1, TOKENS, 3),
        (3 * BLOCK - 1, TOKENS, 2),
        (5 * BLOCK, 5 * BLOCK, 4),
        (5 * BLOCK, 5 * BLOCK + 1, 5),
    ):
        token_ids = (base[:shared] + prompt(4 * TOKENS, salt=9)[shared:])[:tokens]
        steps.clear()
        prefilled, decoded = await pair.hand_over(token_ids, 8)
        assert oracle.first_wrong(token_ids, [prefilled.token_id, *decoded]) is None
        assert (prefilled.cached_tokens, sum(steps)) == (cached * BLOCK, tokens - cached * BLOCK)


@pytest.mark.parametrize("codec", ["zip-4/32", "int8"])
async def test_zipped_blocks_are_those_of_the_first_prompt(codec: str, cluster_workers: Workers) -> None:
    settings = {"codec": codec, "block_tokens": 64, "step_tokens": 64}
    pair = await cluster_workers.pair(Fabric().open, prefill=settings, decode=settings)
    first, tokens = await pair.hand_over(300, 8)
    again, same = await pair.hand_over(300, 8)
    assert (again.cached_tokens, again.token_id, same) == (256, first.token_id, tokens)
    known, reused = (claims_of(answer.handle).refs for answer in (first, again))
    assert list(known)[:-1] == list(reused)[:-1], "blocks, and their sinks with them, are the same slabs"
    assert (known[0].kind == SLAB_KIND_SINKS) is codec.startswith("zip")
    assert known[-1] != reused[-1], "a tail is nobody else's"


async def test_prompts_that_are_computed_together_share_what_is_there(pair: Pair, tiny_model: Path) -> None:
    give_up(pair.prefill, await pair.prefill.compute(TOKENS))
    gate, steps = Gate(pair.prefill.service.device), count(pair.prefill)
    tasks = [asyncio.create_task(pair.prefill.compute(prompt(TOKENS + i))) for i in range(3)]
    await gate.entered()
    gate.open()
    answers = await asyncio.gather(*tasks)
    for i, answer in enumerate(answers):
        assert Oracle(tiny_model).first_wrong(prompt(TOKENS + i), [answer.token_id]) is None
    assert sum(steps) == sum(7 + i for i in range(3))
    assert len({tuple(blocks_of(claims_of(answer.handle))) for answer in answers}) == 1
    assert pair.prefill.service.load().free_blocks == 24 - 5
    give_up(pair.prefill, *answers)
    assert pair.prefill.service.load().free_blocks == 24


async def test_the_same_prompts_at_once_are_computed_once(cluster_workers: Workers, tiny_model: Path) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, step_tokens=2 * BLOCK)
    steps, gate = count(prefill), Gate(prefill.service.device)
    tasks = [asyncio.create_task(prefill.compute(TOKENS, sampling=GREEDY)) for _ in range(3)]
    await until(lambda: prefill.service.load().queued_requests == 2, "two wait")
    gate.open()
    answers = await asyncio.gather(*tasks)
    assert Oracle(tiny_model).first_wrong(prompt(TOKENS), [answers[0].token_id]) is None
    assert len({answer.token_id for answer in answers}) == 1
    assert sorted(answer.cached_tokens for answer in answers) == [0, 5 * BLOCK, 5 * BLOCK]
    assert sum(steps) == TOKENS + 2 * 7
    give_up(prefill, *answers)


async def test_when_the_one_that_computes_goes_away_another_does(cluster_workers: Workers, tiny_model: Path) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, step_tokens=2 * BLOCK)
    gate = Gate(prefill.service.device)
    first = asyncio.create_task(prefill.compute(TOKENS))
    await gate.entered()
    second = asyncio.create_task(prefill.compute(TOKENS))
    await until(lambda: prefill.service.load().queued_requests == 1, "one waits")
    first.cancel()
    gate.open()
    answer = await second
    assert Oracle(tiny_model).first_wrong(prompt(TOKENS), [answer.token_id]) is None
    give_up(prefill, answer)


async def test_tenants_share_nothing(pair: Pair) -> None:
    answers = [await pair.prefill.compute(TOKENS, cache_salt=salt) for salt in ("", "a", "b", "a", "")]
    assert [answer.cached_tokens for answer in answers] == [0, 0, 0, 5 * BLOCK, 5 * BLOCK]
    blocks = [set(blocks_of(claims_of(answer.handle))) for answer in answers]
    assert blocks[1] == blocks[3]
    assert blocks[0] == blocks[4]
    assert blocks[0].isdisjoint(blocks[1])
    assert blocks[2].isdisjoint(blocks[0] | blocks[1])
    give_up(pair.prefill, *answers)


async def test_the_prompts_log_probabilities_need_the_whole_prompt(pair: Pair) -> None:
    sampling = SamplingParams(temperature=0, seed=1, prompt_logprobs=0)
    plain = await pair.prefill.compute(TOKENS)
    told = await pair.prefill.compute(TOKENS, sampling=sampling)
    assert (told.cached_tokens, len(told.prompt_logprobs)) == (0, TOKENS - 1)
    give_up(pair.prefill, plain, told)


async def test_hits_and_misses_are_counted(pair: Pair) -> None:
    for shared, seen in ((TOKENS, (0, 5)), (TOKENS, (5, 5)), (2 * BLOCK, (7, 8))):
        token_ids = prompt(TOKENS)[:shared] + prompt(TOKENS, salt=3)[shared:]
        give_up(pair.prefill, await pair.prefill.compute(token_ids))
        assert looked_for(pair.prefill) == seen
    assert value(pair.prefill.service.metrics, "zipserve_kv_blocks_cached") == 8


async def test_blocks_make_room_for_prompts(cluster_workers: Workers, tiny_model: Path) -> None:
    """Four times as much as there is room for: nothing is refused, and what is left is right."""
    prefill = await cluster_workers.prefill(Fabric().open, kv_blocks=10)
    oracle = Oracle(tiny_model)
    for salt in (*range(8), *range(8)):
        answer = await prefill.compute(prompt(TOKENS, salt))
        assert oracle.first_wrong(prompt(TOKENS, salt), [answer.token_id]) is None
        give_up(prefill, answer)
        await prefill.settled()
    assert value(prefill.service.metrics, "zipserve_kv_prefix_evictions_total") > 0
    assert prefill.service.load().idle_blocks == value(prefill.service.metrics, "zipserve_kv_blocks_cached") == 10


async def test_a_block_that_makes_room_says_so_to_late_readers(cluster_workers: Workers) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, kv_blocks=5)
    first = await prefill.compute(TOKENS)
    give_up(prefill, first)
    second = await prefill.compute(prompt(2 * BLOCK, salt=1))
    for ref in claims_of(first.handle).refs[3:5]:
        kept = any(prefill.service.device.slab_view(SlabKind(ref.kind), ref.slab)[:64])
        assert kept is (ref.slab in blocks_of(claims_of(second.handle)))
    give_up(prefill, second)


@pytest.mark.parametrize(("bound", "cached"), [(0, 0), (2, 2), (5, 5)])
async def test_the_bound(bound: int, cached: int, cluster_workers: Workers) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, prefix_blocks_max=bound)
    answers = [await prefill.compute(TOKENS) for _ in range(2)]
    assert [answer.cached_tokens for answer in answers] == [0, cached * BLOCK]
    assert value(prefill.service.metrics, "zipserve_kv_blocks_cached") == cached
    give_up(prefill, *answers)


@pytest.mark.parametrize("what", ["flipped", "freed"])
@pytest.mark.parametrize("block", [0, 3])
async def test_a_block_that_is_not_what_it_was_is_computed_again(
    what: str, block: int, pair: Pair, tiny_model: Path
) -> None:
    """Whatever wrote into it: no token comes of it, and nobody finds it again."""
    steps = count(pair.prefill)
    first = await pair.prefill.compute(TOKENS)
    ref = claims_of(first.handle).refs[block]
    view = pair.prefill.service.device.slab_view(SlabKind.BLOCK, ref.slab)
    if what == "flipped":
        view[ref.bytes - 1] ^= 1
    else:
        view[:128] = bytes(128)
    again, tokens = await pair.hand_over(prompt(TOKENS), 8)
    assert Oracle(tiny_model).first_wrong(prompt(TOKENS), [again.token_id, *tokens]) is None
    assert again.cached_tokens == block * BLOCK
    assert sum(steps) == 2 * TOKENS - block * BLOCK
    reason = "BLOCK_CORRUPT" if what == "flipped" else "BLOCK_STALE"
    assert failures(pair.prefill.service.metrics) == {reason: 1}
    give_up(pair.prefill, first)
    third = await pair.prefill.compute(TOKENS)
    assert third.cached_tokens == 5 * BLOCK
    give_up(pair.prefill, third)
    assert failures(pair.prefill.service.metrics) == {reason: 1}


async def test_a_chat_reuses_every_full_block_of_its_last_prompt(pair: Pair, tiny_model: Path) -> None:
    oracle, steps = Oracle(tiny_model), count(pair.prefill)
    token_ids, last = prompt(2 * BLOCK + 5), 0
    for turn in range(8):
        steps.clear()
        answer, tokens = await pair.hand_over(token_ids, 6)
        assert oracle.first_wrong(token_ids, [answer.token_id, *tokens]) is None
        assert answer.cached_tokens == last // BLOCK * BLOCK
        assert sum(steps) == len(token_ids) - answer.cached_tokens
        last = len(token_ids)
        token_ids = [*token_ids, answer.token_id, *tokens, *prompt(BLOCK, salt=turn + 1)]
