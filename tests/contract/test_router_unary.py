"""The router's calls with one answer: the whole of a generation, tokens of a prompt, text of tokens, a model."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from polling import until
from router_cluster import PROMPT, Cluster, build, refusal
from router_peers import logprobs_at, text_at, token_at
from zipserve.common.models import ModelFiles
from zipserve.v1.inference_service_pb2 import (
    ChatMessage,
    ChatPrompt,
    DetokenizeRequest,
    GenerateUnaryRequest,
    GenerateUnaryResponse,
    GetModelRequest,
    ListModelsRequest,
    TokenizeRequest,
)
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams, StopConditions

LENGTH = FinishReason.FINISH_REASON_LENGTH
CHAT = ChatPrompt(messages=[ChatMessage(role="user", content="x")])


@pytest.fixture
async def alone(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Cluster:
    """A router without workers."""
    return await build(stack, model, redis_url)


async def test_an_answer_as_a_whole(alone: Cluster) -> None:
    await alone.add("p0", by_seed=True)
    await alone.add("d0", by_seed=True)
    sampling = SamplingParams(seed=5, logprobs=2, prompt_logprobs=1)
    answer: GenerateUnaryResponse = await alone.complete(
        n=3, stop=StopConditions(max_tokens=7), sampling=sampling, metadata=[("x-request-id", "mine-1")]
    )
    started = answer.started
    assert (started.request_id, started.model, started.prompt_tokens, started.seed) == ("mine-1", "tiny", 10, 5)
    assert list(answer.prompt_logprobs) == [logprobs_at(i, 1) for i in range(1, 10)]
    assert len(answer.choices) == 3
    for index, choice in enumerate(answer.choices):
        assert list(choice.token_ids) == [token_at(10 + 5 + index + i) for i in range(7)]
        assert choice.text == text_at(10 + 5 + index, 7)
        assert list(choice.logprobs) == [logprobs_at(i, 2) for i in range(10, 17)]
        finished = choice.finished
        assert (finished.choice, finished.reason, finished.usage.completion_tokens) == (index, LENGTH, 7)
        assert finished.timings.first_token.ToNanoseconds() > 0
    await alone.at_rest()


async def test_the_stop_string_is_told(alone: Cluster) -> None:
    await alone.add("p0")
    decode = await alone.add("d0")
    stop = text_at(14, 3)
    (choice,) = (await alone.complete(stop=StopConditions(max_tokens=400, stop=["nowhere", stop]))).choices
    assert (choice.text, choice.finished.stop_string) == (text_at(10, 4), stop)
    async with asyncio.timeout(5):
        await decode.cancelled.wait()


async def test_the_refusals_of_a_stream_are_those_of_a_whole(alone: Cluster) -> None:
    refused = await refusal(alone.complete(stop=StopConditions(max_tokens=0)))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "stop.max_tokens")
    assert (await refusal(alone.stub.GenerateUnary(GenerateUnaryRequest()))).field == "prompt"
    refused = await refusal(alone.complete(model="gpt-9"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    refused = await refusal(alone.complete())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
    await alone.at_rest()


async def test_too_many_requests(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    """Every call that computes takes a place."""
    cluster = await build(stack, model, redis_url, requests_max=1, worker_wait_s=20)
    waiting = cluster.generate()
    assert (await waiting.read()).WhichOneof("event") == "started"
    calls = (
        cluster.complete(),
        cluster.stub.Tokenize(TokenizeRequest(text="x")),
        cluster.stub.Detokenize(DetokenizeRequest(token_ids=[3])),
    )
    for call in calls:
        refused = await refusal(call)
        assert (refused.reason, refused.retry_s) == ("OVERLOADED", 1.0)
    waiting.cancel()
    await cluster.at_rest()


@pytest.mark.parametrize("ends", ["cancelled", "deadline"])
async def test_what_ends_the_call_ends_every_hop(alone: Cluster, ends: str) -> None:
    async def never_after(position: object) -> None:
        if position == 14:
            await asyncio.Event().wait()

    await alone.add("p0")
    decode = await alone.add("d0", at_token=never_after)
    timeout = 0.5 if ends == "deadline" else 20
    call = asyncio.ensure_future(alone.complete(stop=StopConditions(max_tokens=400), timeout=timeout))
    await until(lambda: decode.position >= 12, "decode goes on from the handle")
    if ends == "cancelled":
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(5):
        await decode.cancelled.wait()
    await alone.at_rest()


async def test_an_answer_too_large_for_a_message_ends_early(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    cluster = await build(stack, model, redis_url, message_bytes_max=1 << 16)
    await cluster.add("p0")
    decode = await cluster.add("d0")
    wanted: dict[str, Any] = {"n": 2, "stop": StopConditions(max_tokens=500), "sampling": SamplingParams(logprobs=20)}
    refused = await refusal(cluster.complete(**wanted))
    assert (refused.reason, refused.field) == ("INVALID_REQUEST", "request")
    assert "which Generate would stream" in refused.message
    assert "a message has at most 65536" in refused.message
    async with asyncio.timeout(5):
        await decode.cancelled.wait()
    assert decode.position < 509, "the rest was not generated"
    await cluster.at_rest()
    assert len([event async for event in cluster.generate(**wanted)]) > 3
    wanted["sampling"] = SamplingParams(logprobs=2)
    assert len((await cluster.complete(**wanted)).choices[0].token_ids) == 500


async def test_tokenize(alone: Cluster) -> None:
    answer = await alone.stub.Tokenize(TokenizeRequest(model="tiny", text="hé!"))
    assert (len(answer.token_ids), answer.context_tokens) == (4, 512)
    assert (await alone.stub.Detokenize(DetokenizeRequest(token_ids=answer.token_ids))).text == "hé!"
    chat = await alone.stub.Tokenize(TokenizeRequest(chat=CHAT))
    prefill = await alone.add("p0", end_at=19)
    await alone.add("d0")
    await alone.complete(chat=CHAT)
    assert list(chat.token_ids) == list(prefill.requests[0].token_ids)  # type: ignore[union-attr]


async def test_detokenize_leaves_out_special_tokens_and_shows_broken_bytes(alone: Cluster) -> None:
    tokens = (await alone.stub.Tokenize(TokenizeRequest(text="é"))).token_ids
    ids = [1, PROMPT.ids[0], tokens[0], 2]
    assert (await alone.stub.Detokenize(DetokenizeRequest(token_ids=ids))).text == "!\ufffd"
    assert (await alone.stub.Detokenize(DetokenizeRequest())).text == ""


async def test_what_tokenize_and_detokenize_refuse(alone: Cluster) -> None:
    stub = alone.stub
    for call, code, field in (
        (stub.Tokenize(TokenizeRequest()), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (stub.Tokenize(TokenizeRequest(chat=ChatPrompt())), grpc.StatusCode.INVALID_ARGUMENT, "chat.messages"),
        (stub.Tokenize(TokenizeRequest(model="gpt-9", text="x")), grpc.StatusCode.NOT_FOUND, ""),
        (stub.Detokenize(DetokenizeRequest(model="gpt-9")), grpc.StatusCode.NOT_FOUND, ""),
        (stub.GetModel(GetModelRequest(model="gpt-9")), grpc.StatusCode.NOT_FOUND, ""),
        (
            stub.Detokenize(DetokenizeRequest(token_ids=[3, 259])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "token_ids[1]",
        ),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.field) == (code, field), refused
    await alone.at_rest()


async def test_answers_that_fit_into_no_message(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, message_bytes_max=1 << 16)
    refused = await refusal(cluster.stub.Tokenize(TokenizeRequest(text="é" * 30_000)))  # its ids take two bytes each
    assert (refused.reason, refused.field) == ("INVALID_REQUEST", "prompt")
    assert refused.message.startswith("the answer's 60000 ids make ")
    (replacement,) = {*(await cluster.stub.Tokenize(TokenizeRequest(text="\x01"))).token_ids}
    assert replacement > 127
    ids = [*(await cluster.stub.Tokenize(TokenizeRequest(text="!"))).token_ids, replacement]
    assert (await cluster.stub.Detokenize(DetokenizeRequest(token_ids=ids))).text == "!\x01"
    (broken,) = [i for i in range(128, 259) if i == 3 + 94 + 50]  # a byte of no character: three bytes as U+FFFD
    refused = await refusal(cluster.stub.Detokenize(DetokenizeRequest(token_ids=[broken] * 30_000)))
    assert (refused.reason, refused.field) == ("INVALID_REQUEST", "token_ids")


@pytest.mark.parametrize("rpc", ["tokenize", "detokenize"])
async def test_long_inputs_leave_the_loop_to_others(alone: Cluster, rpc: str) -> None:
    stub = alone.stub
    call = (
        stub.Tokenize(TokenizeRequest(text="word " * 150_000))
        if rpc == "tokenize"
        else stub.Detokenize(DetokenizeRequest(token_ids=[70] * 1_000_000))
    )
    long = asyncio.ensure_future(call)
    served = 0
    while not long.done():
        await stub.ListModels(ListModelsRequest())
        served += 1
    answer = await long
    assert len(answer.token_ids if rpc == "tokenize" else answer.text) >= 750_000
    assert served > 10
    await alone.at_rest()


async def test_a_short_deadline_of_a_long_text(alone: Cluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await alone.stub.Tokenize(TokenizeRequest(text="word " * 600_000), timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await alone.at_rest()


async def test_a_draining_router_refuses(alone: Cluster) -> None:
    alone.service.begin_drain()
    for call in (
        alone.complete(),
        alone.stub.Tokenize(TokenizeRequest(text="x")),
        alone.stub.Detokenize(DetokenizeRequest(token_ids=[3])),
    ):
        assert (await refusal(call)).reason == "DRAINING"
