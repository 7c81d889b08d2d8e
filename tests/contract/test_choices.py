"""Several choices of one prompt on real workers: computed, read and held once, and each as if it were alone."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from memory_transport import Fabric
from polling import until
from workers import BLOCK, Gate, Pair, Workers, claims_of, prompt, value
from zipserve.common import errors
from zipserve.v1.decode_service_pb2 import DecodeResponse, EndSequenceRequest, Sibling
from zipserve.v1.prefill_service_pb2 import PrefillResponse
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams

SEED, N = 70, 4
SAMPLING = SamplingParams(temperature=2.0, top_p=0.95, seed=SEED, frequency_penalty=0.5, logprobs=2)
ZIPPED: dict[str, Any] = {"codec": "zip-4/32", "block_tokens": 64}


@pytest.fixture
async def pair(cluster_workers: Workers) -> Pair:
    return await cluster_workers.pair(Fabric().open)


def seeded(choice: int) -> SamplingParams:
    sampling = SamplingParams()
    sampling.CopyFrom(SAMPLING)
    sampling.seed = SEED + choice
    return sampling


def siblings(prefilled: PrefillResponse) -> list[Sibling]:
    return [Sibling(token_id=c.token_id, seed=SEED + i) for i, c in enumerate(prefilled.other_choices, start=1)]


def by_sequence(events: list[DecodeResponse], tokens: int) -> list[list[int]]:
    """The tokens of each sequence, which come at growing positions and are followed by one end."""
    found: dict[int, list[int]] = {}
    ended = []
    for event in events[1:]:
        if event.HasField("finished"):
            ended.append(event.finished.sequence)
            continue
        own = found.setdefault(event.tokens.sequence, [])
        assert event.tokens.sequence not in ended
        assert event.tokens.position == tokens + 1 + len(own)
        assert len(event.tokens.logprobs) == len(event.tokens.token_ids)
        own += event.tokens.token_ids
    assert sorted(ended) == sorted(found)
    return [found[number] for number in range(len(found))]


async def alone(pair: Pair, token_ids: list[int], new: int, choice: int) -> list[int]:
    border: dict[str, Any] = {"sampling": seeded(choice), "prompt_tokens": len(token_ids)}
    first = await pair.prefill.compute(token_ids, **border)
    return [first.token_id, *await pair.decode.tokens(first, new, past_token_ids=token_ids, **border)]


async def together(pair: Pair, token_ids: list[int], new: int, n: int = N) -> list[list[int]]:
    border: dict[str, Any] = {"sampling": SAMPLING, "prompt_tokens": len(token_ids)}
    first = await pair.prefill.compute(token_ids, choices=n, **border)
    events = await pair.decode.events(first, new, past_token_ids=token_ids, siblings=siblings(first), **border)
    assert first.other_choices[0].HasField("logprobs")
    rest = by_sequence(events, len(token_ids))
    firsts = [first.token_id, *(choice.token_id for choice in first.other_choices)]
    return [[one, *tokens] for one, tokens in zip(firsts, rest, strict=True)]


@pytest.mark.parametrize("tokens", [5, BLOCK, 40, 3 * BLOCK])
async def test_choices_are_those_of_single_requests(pair: Pair, tokens: int) -> None:
    """With and without full blocks and a tail to share, over block borders in decode."""
    expected = [await alone(pair, prompt(tokens), 20, choice) for choice in range(N)]
    assert await together(pair, prompt(tokens), 20) == expected
    assert len({tuple(choice) for choice in expected}) == N
    await pair.settled()


async def test_zipped_choices_are_those_of_single_requests(cluster_workers: Workers) -> None:
    """Their tails and scores are shared, and their sinks."""
    pair = await cluster_workers.pair(Fabric().open, prefill={**ZIPPED, "prefix_blocks_max": 0}, decode=ZIPPED)
    for tokens in (30, 100):
        expected = [await alone(pair, prompt(tokens), 100, choice) for choice in range(3)]
        assert await together(pair, prompt(tokens), 100, 3) == expected


async def test_the_prompt_is_read_and_held_once(pair: Pair) -> None:
    first = await pair.prefill.compute(prompt(70), choices=N, sampling=SAMPLING, prompt_tokens=70)
    gate = Gate(pair.decode.service.device)
    border: dict[str, Any] = {"sampling": SAMPLING, "prompt_tokens": 70, "past_token_ids": prompt(70)}
    task = asyncio.create_task(pair.decode.events(first, 8, siblings=siblings(first), **border))
    await gate.entered()
    load = pair.decode.service.load()
    assert (load.total_blocks - load.free_blocks, load.total_tails - load.free_tails) == (4, 1)
    assert load.running_requests == N
    gate.open()
    events = await task
    assert events[0].pulled.bytes == sum(ref.bytes for ref in claims_of(first.handle).refs)
    assert sorted(len(tokens) for tokens in by_sequence(events, 70)) == [8] * N


async def test_a_choice_that_ends_leaves_the_prompt_to_the_others(pair: Pair) -> None:
    """With a stop token of its own; what it alone held is free at once."""
    free = [await alone(pair, prompt(40), 30, choice) for choice in range(N)]
    stop = next(t for t in free[1][3:] if all(t not in tokens for i, tokens in enumerate(free) if i != 1))
    border: dict[str, Any] = {"sampling": SAMPLING, "prompt_tokens": 40}
    first = await pair.prefill.compute(prompt(40), choices=N, **border)
    events = await pair.decode.events(
        first, 30, past_token_ids=prompt(40), siblings=siblings(first), stop_token_ids=[stop], **border
    )
    found = by_sequence(events, 40)
    assert found[1] == free[1][1 : free[1].index(stop) + 1]
    assert [found[i] for i in (0, 2, 3)] == [free[i][1:] for i in (0, 2, 3)]
    reasons = {e.finished.sequence: e.finished.reason for e in events if e.HasField("finished")}
    length, stopped = FinishReason.FINISH_REASON_LENGTH, FinishReason.FINISH_REASON_STOP
    assert reasons == {0: length, 1: stopped, 2: length, 3: length}


async def test_a_choice_that_is_ended_leaves_the_others(pair: Pair) -> None:
    """It ends at once, and once; the token that is being computed is not told any more."""
    free = [await alone(pair, prompt(40), 20, choice) for choice in range(N)]
    border: dict[str, Any] = {"sampling": SAMPLING, "prompt_tokens": 40}
    first = await pair.prefill.compute(prompt(40), choices=N, **border)
    changes = {"past_token_ids": prompt(40), "siblings": siblings(first), "stream_id": b"s", **border}
    gate = Gate(pair.decode.service.device)
    task = asyncio.create_task(pair.decode.events(first, 20, **changes))
    await gate.entered()
    for stream_id, sequence in ((b"s", 2), (b"s", 2), (b"s", N), (b"?", 0), (b"", 0)):
        await pair.decode.stub.EndSequence(EndSequenceRequest(stream_id=stream_id, sequence=sequence))
    assert not task.done()
    gate.open()
    events = await task
    assert (events[1].finished.sequence, events[1].finished.reason) == (2, FinishReason.FINISH_REASON_STOP)
    found = {i: [t for e in events if e.tokens.sequence == i for t in e.tokens.token_ids] for i in range(N)}
    assert found == {i: [] if i == 2 else free[i][1:] for i in range(N)}
    assert sum(event.HasField("finished") for event in events) == N
    await pair.settled()


async def test_a_failure_of_a_choice_that_is_ended_is_nobodys(pair: Pair) -> None:
    first = await pair.prefill.compute(prompt(40), choices=2)
    engine = pair.decode.service.device.engine
    forward, steps = engine.forward, iter(range(100))

    def refuse_second(segments: Any) -> Any:
        step = forward(segments)
        return replace(step, failed={1: errors.KvValueError("of a test")}) if next(steps) == 0 else step

    engine.forward = refuse_second  # type: ignore[method-assign]
    gate = Gate(pair.decode.service.device)
    task = asyncio.create_task(pair.decode.events(first, siblings=siblings(first), stream_id=b"s"))
    await gate.entered()
    await pair.decode.stub.EndSequence(EndSequenceRequest(stream_id=b"s", sequence=1))
    gate.open()
    assert sum(len(event.tokens.token_ids) for event in await task) == 8
    await pair.settled()


async def test_a_stream_id_is_of_one_call(pair: Pair) -> None:
    gate = Gate(pair.decode.service.device)
    one, other = await pair.prefill.compute(20), await pair.prefill.compute(20)
    task = asyncio.create_task(pair.decode.events(one, stream_id=b"s"))
    await gate.entered()
    await pair.decode.refused(other, errors.InvalidRequestError, stream_id=b"s")
    gate.open()
    await task
    await pair.settled()
    assert len(await pair.decode.tokens(await pair.prefill.compute(20), stream_id=b"s")) == 8


async def test_choices_that_cannot_grow_together_take_turns(cluster_workers: Workers) -> None:
    """Some are parked, and come back with blocks of their own."""
    wide = await cluster_workers.pair(Fabric().open)
    expected = await together(wide, prompt(40), 90)
    await wide.settled()
    narrow = await cluster_workers.pair(
        Fabric().open, prefill={"worker_id": "prefill-2"}, decode={"worker_id": "decode-2", "kv_blocks": 12}
    )
    assert await together(narrow, prompt(40), 90) == expected
    assert value(narrow.decode.service.metrics, "zipserve_parkings_total") > 0


async def test_going_away_frees_all(pair: Pair) -> None:
    first = await pair.prefill.compute(prompt(40), choices=N)
    call = pair.decode.stub.Decode(pair.decode.request(first, 300, siblings=siblings(first)), timeout=20)
    seen = 0
    async for event in call:
        seen += len(event.tokens.token_ids)
        if seen > 20:
            break
    call.cancel()
    await until(lambda: pair.decode.service.load().running_requests == 0, "nobody runs")
    await pair.settled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"siblings": [Sibling(token_id=1)] * 16}, "there are 16 siblings, at most 15 are allowed"),
        ({"siblings": [Sibling(token_id=259)]}, "token id 259 is outside the vocabulary"),
    ],
)
async def test_siblings_that_are_wrong(pair: Pair, changes: dict[str, Any], message: str) -> None:
    prefilled = await pair.prefill.compute(prompt(40))
    refused = await pair.decode.refused(prefilled, errors.InvalidRequestError, **changes)
    assert getattr(refused, "field", "") == "siblings"
    assert message in str(refused)
    pair.prefill.service.source.release_handle(prefilled.handle)


async def test_choices_beyond_the_slots_may_come_one_by_one(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(prompt(40))
    refused = await pair.decode.refused(prefilled, errors.OverloadedError, siblings=[Sibling(token_id=1)] * 4)
    assert "5 sequences of one prompt are more than the 4 of this worker" in str(refused)


async def test_too_many_choices(pair: Pair) -> None:
    with pytest.raises(errors.InvalidRequestError, match="choices is 17, at most 16"):
        await pair.prefill.compute(40, choices=17)
