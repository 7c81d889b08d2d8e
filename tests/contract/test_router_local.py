"""The router where decode workers compute prompts themselves: all of them, or the short ones."""

from contextlib import AsyncExitStack

import grpc
import pytest

from router_cluster import PROMPT, Cluster, answer, build, refusal
from router_peers import logprobs_at, text_at, token_at
from zipserve.common.errors import UnavailableError
from zipserve.common.models import ModelFiles
from zipserve.v1.decode_service_pb2 import DecodeRequest
from zipserve.v1.inference_service_pb2 import TokenIds
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions

TOKENS = len(PROMPT.ids)


@pytest.fixture
async def alone(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Cluster:
    """A router without workers, in colocated mode."""
    return await build(stack, model, redis_url, local_prefill_tokens_max=-1)


async def test_no_prefill_worker_is_needed(alone: Cluster) -> None:
    decode = await alone.add("d0")
    sampling = SamplingParams(seed=5, presence_penalty=1.0)
    result = await answer(alone.generate(stop=StopConditions(max_tokens=7), sampling=sampling, priority=2))
    assert result.token_ids == [token_at(TOKENS + i) for i in range(7)]
    assert result.text == text_at(TOKENS, 7)
    timings, kv = result.finished.timings, result.finished.kv_transfer
    assert (timings.queue.ToMilliseconds(), timings.prefill.ToMilliseconds()) == (250, 500)
    assert (kv.bytes, kv.blocks, kv.tokens) == (0, 0, 0)
    (asked,) = decode.requests
    assert isinstance(asked, DecodeRequest)
    assert list(asked.prompt_token_ids) == list(PROMPT.ids)
    assert not asked.HasField("handle")
    assert (asked.max_new_tokens, asked.priority, asked.prompt_tokens) == (7, 2, TOKENS)
    await alone.at_rest()


async def test_no_worker(alone: Cluster) -> None:
    await alone.add("p0")
    refused = await refusal(alone.generate())
    assert (refused.code, refused.message) == (grpc.StatusCode.UNAVAILABLE, "no decode worker is alive")


async def test_short_prompts_only(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, local_prefill_tokens_max=TOKENS)
    prefill, decode = await cluster.add("p0"), await cluster.add("d0")
    for tokens in (TOKENS, TOKENS + 1):
        await answer(cluster.generate(token_ids=TokenIds(ids=[3] * tokens), stop=StopConditions(max_tokens=3)))
    assert [len(asked.token_ids) for asked in prefill.requests] == [TOKENS + 1]  # type: ignore[union-attr]
    assert [len(asked.prompt_token_ids) for asked in decode.requests] == [TOKENS, 0]  # type: ignore[union-attr]


async def test_a_dying_worker_is_replayed(alone: Cluster) -> None:
    """In the middle, and the other one computes what the client has already."""
    dies = {"d0", "d1"}

    async def fail_once(position: object) -> None:
        if position == TOKENS + 4 and len(dies) == 2:
            dies.pop()
            raise UnavailableError("it broke")

    peers = [await alone.add(name, at_token=fail_once) for name in ("d0", "d1")]
    result = await answer(alone.generate(stop=StopConditions(max_tokens=12)))
    assert result.token_ids == [token_at(TOKENS + i) for i in range(12)]
    assert result.finished.usage.replays == 1
    asked = [len(request.prompt_token_ids) for peer in peers for request in peer.requests]  # type: ignore[union-attr]
    assert sorted(asked) == [TOKENS, TOKENS + 4]
    await alone.at_rest()


async def test_the_log_probabilities_of_a_prompt_are_told_once(alone: Cluster) -> None:
    """Also when the worker dies between them and the first token."""

    async def fail_once(position: object) -> None:
        if len(decode.requests) == 1:
            raise UnavailableError("it broke")

    decode = await alone.add("d0", at_token=fail_once)
    call = alone.generate(stop=StopConditions(max_tokens=3), sampling=SamplingParams(prompt_logprobs=1))
    responses = [response async for response in call]
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", "prompt_logprobs", *["delta"] * (len(kinds) - 3), "finished"]
    assert list(responses[1].prompt_logprobs.logprobs) == [logprobs_at(i, 1) for i in range(1, TOKENS)]
    assert responses[-1].finished.usage.replays == 1


async def test_a_replay_that_has_become_long_goes_to_a_prefill_worker(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    cluster = await build(stack, model, redis_url, local_prefill_tokens_max=TOKENS)
    failed: list[object] = []

    async def fail_once(position: object) -> None:
        if position == TOKENS + 4 and not failed:
            failed.append(position)
            raise UnavailableError("it broke")

    prefill = await cluster.add("p0")
    await cluster.add("d0", at_token=fail_once)
    result = await answer(cluster.generate(stop=StopConditions(max_tokens=12)))
    assert result.token_ids == [token_at(TOKENS + i) for i in range(12)]
    assert [len(asked.token_ids) for asked in prefill.requests] == [TOKENS + 4]  # type: ignore[union-attr]
