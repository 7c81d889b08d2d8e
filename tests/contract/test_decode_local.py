"""A decode worker that computes prompts itself, in chunks beside the sequences that it continues."""

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from workers import BLOCK, GREEDY, Decode, Pair, Workers, prompt, value
from zipserve.common import errors
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.rpc.status import client_errors
from zipserve.v1.decode_service_pb2 import DecodeRequest, DecodeResponse
from zipserve.v1.prefill_service_pb2 import PrefillResponse
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams

STEP = 32


@pytest.fixture
async def decode(cluster_workers: Workers) -> Decode:
    return await cluster_workers.decode(Fabric().open, step_tokens=STEP)


def request(token_ids: list[int], tokens: int, **changes: Any) -> DecodeRequest:
    fields = {"request_id": "r", "prompt_token_ids": token_ids, "sampling": GREEDY, "max_new_tokens": tokens}
    return DecodeRequest(**{**fields, **changes})


async def events(decode: Decode, message: DecodeRequest, timeout_s: float = 20.0) -> list[DecodeResponse]:
    with client_errors():
        return [event async for event in decode.stub.Decode(message, timeout=timeout_s)]


async def generate(decode: Decode, token_ids: list[int], tokens: int = 8, **changes: Any) -> list[int]:
    """All tokens of a stream, whose shape is checked."""
    got = await events(decode, request(token_ids, tokens, **changes))
    kinds = [event.WhichOneof("event") for event in got]
    assert kinds == ["computed", *["tokens"] * (len(kinds) - 2), "finished"]
    found: list[int] = []
    for event in got[1:-1]:
        assert event.tokens.position == len(token_ids) + len(found)
        found += event.tokens.token_ids
    return found


class Steps:
    """What a device computes: the tokens of each sequence of every step."""

    def __init__(self, decode: Decode, seconds: float = 0.0) -> None:
        self.tokens: list[list[int]] = []
        forward = decode.service.device.engine.forward

        def watched(segments: Any) -> Any:
            self.tokens.append([len(segment.token_ids) for segment in segments])
            time.sleep(seconds)  # a slow machine
            return forward(segments)

        decode.service.device.engine.forward = watched  # type: ignore[method-assign]


async def test_tokens_are_right(decode: Decode, tiny_model: Path) -> None:
    oracle = Oracle(tiny_model)
    for tokens in (1, 15, 16, 17, STEP, STEP + 1, 200):
        found = await generate(decode, prompt(tokens), 35)
        assert len(found) == 35
        assert oracle.first_wrong(prompt(tokens), found) is None, f"after {tokens} tokens"


async def test_one_token_is_enough(decode: Decode, tiny_model: Path) -> None:
    (token,) = await generate(decode, prompt(40), 1)
    assert Oracle(tiny_model).first_wrong(prompt(40), [token]) is None
    got = await events(decode, request(prompt(40), 9, stop_token_ids=[token]))
    assert [list(event.tokens.token_ids) for event in got[1:-1]] == [[token]]
    assert got[-1].finished.reason == FinishReason.FINISH_REASON_STOP


async def test_prompts_and_streams_together_are_those_alone(decode: Decode, tiny_model: Path) -> None:
    steps = Steps(decode)
    prompts = [prompt(10 + 29 * i, salt=i) for i in range(4)]
    found = await asyncio.gather(*(generate(decode, token_ids, 20 + i) for i, token_ids in enumerate(prompts)))
    oracle = Oracle(tiny_model)
    for token_ids, tokens in zip(prompts, found, strict=True):
        assert oracle.first_wrong(token_ids, tokens) is None
    assert any(1 in step and max(step) > 1 for step in steps.tokens), "no chunk was beside a decoding sequence"


async def test_beside_pulled_sequences(cluster_workers: Workers, tiny_model: Path) -> None:
    pair, oracle = await cluster_workers.pair(Fabric().open, decode={"step_tokens": STEP}), Oracle(tiny_model)
    first, second, (prefilled, pulled) = await asyncio.gather(
        generate(pair.decode, prompt(100), 50),
        generate(pair.decode, prompt(100, 1), 50),
        pair.hand_over(prompt(70, 5), 50),
    )
    assert oracle.first_wrong(prompt(100), first) is None
    assert oracle.first_wrong(prompt(100, 1), second) is None
    assert oracle.first_wrong(prompt(70, 5), [prefilled.token_id, *pulled]) is None


async def test_a_long_prompt_does_not_stop_the_streams(cluster_workers: Workers) -> None:
    decode = await cluster_workers.decode(Fabric().open, step_tokens=256, step_slowdown_max=1.5)
    steps = Steps(decode, seconds=0.003)
    stream = asyncio.create_task(generate(decode, prompt(5), 120))
    await until(lambda: len(steps.tokens) > 5, "it streams")
    await generate(decode, prompt(200), 1)
    mixed = [step for step in steps.tokens if max(step) > 1 and len(step) > 1]
    assert all(1 in step for step in mixed), "a step left the stream out"
    assert len(mixed) >= 2, "the prompt came in one chunk"
    assert len(await stream) == 120


async def test_what_is_told_of_the_prompt(decode: Decode) -> None:
    got = await events(
        decode, request(prompt(40), 2, sampling=SamplingParams(temperature=0, seed=1, prompt_logprobs=2))
    )
    computed = got[0].computed
    assert to_seconds(computed.compute_time) > 0
    assert [len(each.top_token_ids) for each in computed.prompt_logprobs] == [2] * 39
    metrics = decode.service.metrics
    assert value(metrics, "zipserve_prompt_tokens_total") == 40
    assert value(metrics, "zipserve_generated_tokens_total") == 2


async def test_it_equals_a_prefill_elsewhere(cluster_workers: Workers) -> None:
    """Penalties, seeds and log-probabilities included: a replay may go either way."""
    pair = await cluster_workers.pair(Fabric().open)
    sampling = SamplingParams(temperature=2.0, top_p=0.9, seed=77, presence_penalty=1.0, logprobs=1, prompt_logprobs=1)
    fields: dict[str, Any] = {"sampling": sampling, "prompt_tokens": 40}
    prefilled = await pair.prefill.compute(40, **fields)
    tokens = await pair.decode.tokens(prefilled, 10, past_token_ids=prompt(40), **fields)
    got = await events(pair.decode, request(prompt(40), 11, **fields))
    local = [token for event in got for token in event.tokens.token_ids]
    assert local == [prefilled.token_id, *tokens]
    assert [each.logprob for each in got[0].computed.prompt_logprobs] == pytest.approx(
        [each.logprob for each in prefilled.prompt_logprobs], abs=1e-4
    )
    again = await generate(pair.decode, [*prompt(40), *local[:4]], 7, **fields)
    assert again == local[4:]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"prompt_token_ids": []}, "handle", "either a handle or prompt_token_ids"),
        ({"handle": {"claims": b"x"}}, "handle", "either a handle or prompt_token_ids"),
        ({"prompt_token_ids": [3, 259]}, "prompt_token_ids", "token id 259 is outside the vocabulary of 259"),
        ({"max_new_tokens": 0}, "max_new_tokens", "max_new_tokens is 0"),
        ({"max_new_tokens": 4057}, "max_new_tokens", "40 tokens and 4057 new ones exceed the context of 4096"),
        ({"max_new_tokens": 361}, "max_new_tokens", "a sequence of 400 tokens needs 25 KV blocks, this worker has 24"),
    ],
)
async def test_a_request_that_is_wrong(changes: dict[str, Any], field: str, message: str, decode: Decode) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message) as raised:
        await events(decode, request(prompt(40), 8, **changes))
    assert raised.value.field == field
    await decode.settled()


@pytest.mark.parametrize("timeout_s", [20.0, 0.15])
async def test_a_caller_that_goes_away_in_the_middle_of_its_prompt(decode: Decode, timeout_s: float) -> None:
    steps = Steps(decode, seconds=0.05)
    task = asyncio.create_task(events(decode, request(prompt(300), 8), timeout_s))
    await until(lambda: len(steps.tokens) > 0, "it is being computed")
    if timeout_s > 1:
        task.cancel()
    with pytest.raises((asyncio.CancelledError, errors.DeadlineError)):
        await task
    await decode.settled()
    assert len(steps.tokens) < 300 // STEP


async def test_a_failing_step_fails_its_prompt(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decode.service.device.engine
    forward, calls = engine.forward, itertools.count()

    def fail_third(*args: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("out of luck")
        return forward(*args)

    monkeypatch.setattr(engine, "forward", fail_third)
    with pytest.raises(errors.UnavailableError, match="worker's log"):
        await events(decode, request(prompt(200), 8))
    await decode.settled()
    assert len(await generate(decode, prompt(200), 8)) == 8


async def test_prompts_are_parked_and_come_back(cluster_workers: Workers, tiny_model: Path) -> None:
    """Even in the middle: a stream that grows takes the blocks of a younger prompt."""
    decode = await cluster_workers.decode(Fabric().open, step_tokens=BLOCK, kv_blocks=9)
    found = await asyncio.gather(*(generate(decode, prompt(40 + 9 * i, salt=i), 60) for i in range(4)))
    oracle = Oracle(tiny_model)
    for i, tokens in enumerate(found):
        assert len(tokens) == 60
        assert oracle.first_wrong(prompt(40 + 9 * i, salt=i), tokens) is None
    assert value(decode.service.metrics, "zipserve_parkings_total") >= 1


async def test_a_handle_still_works(cluster_workers: Workers) -> None:
    pair: Pair = await cluster_workers.pair(Fabric().open)
    prefilled: PrefillResponse = await pair.prefill.compute(40)
    tokens = await pair.decode.tokens(prefilled, 8)
    assert await generate(pair.decode, prompt(40), 9) == [prefilled.token_id, *tokens]
