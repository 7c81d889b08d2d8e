"""The router alone: real gRPC, real registry, fake workers. Every RPC, and every way in which a request is refused."""

import asyncio
import math
import re
import uuid
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from polling import until
from router_cluster import PROMPT, Cluster, answer, build, refusal
from router_peers import logprobs_at, text_at, token_at
from zipserve.common.errors import WorkerLostError
from zipserve.common.models import ModelFiles
from zipserve.v1.inference_service_pb2 import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    GetModelRequest,
    ListModelsRequest,
    Model,
    TokenIds,
)
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams, StopConditions

GENERATE = "/zipserve.v1.InferenceService/Generate"
STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


@pytest.fixture
async def alone(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Cluster:
    """A router without workers."""
    return await build(stack, model, redis_url)


@pytest.fixture
async def cluster(alone: Cluster) -> Cluster:
    """A router with one prefill and one decode worker."""
    await alone.add("p0")
    await alone.add("d0")
    return alone


async def test_generate_from_token_ids(cluster: Cluster) -> None:
    result = await answer(cluster.generate(stop=StopConditions(max_tokens=7), sampling=SamplingParams(seed=5)))
    assert result.token_ids == [token_at(10 + i) for i in range(7)]
    assert result.text == text_at(10, 7)
    assert (result.started.model, result.started.prompt_tokens, result.started.seed) == ("tiny", 10, 5)
    finished = result.finished
    assert (finished.reason, finished.usage.prompt_tokens, finished.usage.replays) == (LENGTH, 10, 0)
    assert (finished.timings.queue.ToMilliseconds(), finished.timings.prefill.ToMilliseconds()) == (250, 500)
    assert finished.timings.transfer.ToMilliseconds() == 250
    assert finished.timings.first_token.ToNanoseconds() > 0
    assert finished.timings.decode.ToNanoseconds() > 0
    kv = finished.kv_transfer
    assert (kv.bytes, kv.blocks, kv.tokens) == (4096, 1, 10)


async def test_what_the_workers_are_asked(alone: Cluster) -> None:
    prefill, decode = await alone.add("p0"), await alone.add("d0")
    stop = StopConditions(max_tokens=7, stop_token_ids=[9])
    await answer(
        alone.generate(stop=stop, metadata=[("x-request-id", "mine-1")], sampling=SamplingParams(top_k=3), priority=-3)
    )
    asked, continued = prefill.requests[0], decode.requests[0]
    assert (asked.request_id, continued.request_id) == ("mine-1", "mine-1")
    assert [m["x-request-id"] for m in (prefill.metadata[0], decode.metadata[0])] == ["mine-1", "mine-1"]
    assert list(asked.token_ids) == list(PROMPT.ids)  # type: ignore[union-attr]
    assert asked.layout_fingerprint == b"layout A"  # type: ignore[union-attr]
    assert asked.sampling == continued.sampling
    assert (asked.priority, continued.priority) == (-3, -3)
    assert asked.sampling.HasField("seed")
    assert (asked.sampling.top_k, asked.sampling.temperature) == (3, 1.0)
    assert continued.handle.mac == b"signed"  # type: ignore[union-attr]
    assert (continued.token_id, continued.max_new_tokens) == (token_at(10), 6)  # type: ignore[union-attr]
    assert list(continued.stop_token_ids) == [2, 9]
    # gRPC rounds deadlines up on the wire
    assert all(0 < timeout_s < 21 for timeout_s in prefill.timeouts_s + decode.timeouts_s)


async def test_every_parameter_reaches_the_workers(alone: Cluster) -> None:
    prefill, decode = await alone.add("p0"), await alone.add("d0")
    sampling = SamplingParams(
        temperature=0.5, top_k=3, top_p=0.5, seed=11, min_p=0.25, repetition_penalty=1.5, presence_penalty=-1,
        frequency_penalty=0.5, logit_bias={7: -1.5, 3: 100}, logprobs=0, prompt_logprobs=20,
    )  # fmt: skip
    stop = StopConditions(max_tokens=7, min_tokens=4, stop_token_ids=[9])
    await answer(alone.generate(stop=stop, sampling=sampling))
    asked, continued = prefill.requests[0], decode.requests[0]
    for request in (asked, continued):
        assert request.sampling == sampling
        assert (request.prompt_tokens, request.min_tokens) == (10, 4)
        assert list(request.stop_token_ids) == [2, 9]
    assert list(continued.past_token_ids) == list(PROMPT.ids)  # type: ignore[union-attr]


async def test_log_probabilities(cluster: Cluster) -> None:
    sampling = SamplingParams(logprobs=2, prompt_logprobs=1)
    call = cluster.generate(stop=StopConditions(max_tokens=5), sampling=sampling)
    responses = [response async for response in call]
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", "prompt_logprobs", *["delta"] * (len(kinds) - 3), "finished"]
    assert list(responses[1].prompt_logprobs.logprobs) == [logprobs_at(i, 1) for i in range(1, 10)]
    found = [of_token for response in responses for of_token in response.delta.logprobs]
    assert found == [logprobs_at(i, 2) for i in range(10, 15)]
    for response in responses:
        assert len(response.delta.logprobs) == len(response.delta.token_ids)


async def test_a_replay_says_where_the_prompt_ends(alone: Cluster) -> None:
    prefill, failed = await alone.add("p0"), False

    async def fail_once(position: object) -> None:
        nonlocal failed
        if position == 14 and not failed:
            failed = True
            raise WorkerLostError("a fault of a test")

    decode = await alone.add("d0", at_token=fail_once)
    result = await answer(
        alone.generate(
            stop=StopConditions(max_tokens=9), sampling=SamplingParams(frequency_penalty=1, prompt_logprobs=0)
        )
    )
    assert result.token_ids == [token_at(10 + i) for i in range(9)]
    assert result.finished.usage.replays == 1
    again, continued = prefill.requests[1], decode.requests[1]
    assert list(again.token_ids) == [*PROMPT.ids, *result.token_ids[:4]]  # type: ignore[union-attr]
    assert [request.sampling.HasField("prompt_logprobs") for request in prefill.requests] == [True, False]
    assert (again.prompt_tokens, continued.prompt_tokens) == (10, 10)
    assert list(continued.past_token_ids) == list(again.token_ids)  # type: ignore[union-attr]


async def test_min_tokens_raise_the_default_of_max_tokens(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    cluster = await build(stack, model, redis_url, completion_tokens_default=5)
    await cluster.add("p0")
    await cluster.add("d0")
    assert len((await answer(cluster.generate())).token_ids) == 5
    assert len((await answer(cluster.generate(stop=StopConditions(min_tokens=8)))).token_ids) == 8


async def test_text_and_chat(cluster: Cluster) -> None:
    text = await answer(cluster.generate(text="héllo", stop=StopConditions(max_tokens=2)))
    assert text.started.prompt_tokens == 6
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="x")])
    assert (await answer(cluster.generate(chat=chat, stop=StopConditions(max_tokens=2)))).started.prompt_tokens == 19


async def test_seeds_are_drawn_and_reported(cluster: Cluster) -> None:
    results = [await answer(cluster.generate(stop=StopConditions(max_tokens=1))) for _ in range(2)]
    assert results[0].started.seed != results[1].started.seed


@pytest.mark.parametrize("given", ["", "with space", "x" * 129])
async def test_a_bad_request_id_is_replaced(cluster: Cluster, given: str) -> None:
    call = cluster.generate(stop=StopConditions(max_tokens=1), metadata=[("x-request-id", given)])
    request_id = (await answer(call)).started.request_id
    assert uuid.UUID(request_id).hex == request_id


async def test_eos_ends_and_counts(alone: Cluster) -> None:
    await alone.add("p0", end_at=13)
    await alone.add("d0", end_at=13)
    result = await answer(alone.generate(stop=StopConditions(max_tokens=50)))
    assert (result.finished.reason, result.token_ids[-1], len(result.token_ids)) == (STOP, 2, 4)
    assert result.finished.stop_string == ""
    assert result.text == text_at(10, 3)
    ignoring = await answer(alone.generate(stop=StopConditions(max_tokens=50, ignore_eos=True)))
    assert (ignoring.finished.reason, len(ignoring.token_ids)) == (LENGTH, 50)


async def test_a_first_token_that_ends_releases_the_handle(alone: Cluster) -> None:
    prefill, decode = await alone.add("p0", end_at=10), await alone.add("d0")
    result = await answer(alone.generate())
    assert (result.finished.reason, result.token_ids, result.text) == (STOP, [2], "")
    async with asyncio.timeout(5):
        await prefill.changed.wait()
    assert prefill.released == list(prefill.issued)
    assert decode.requests == []


async def test_a_stop_string_ends_the_stream_and_the_decode(alone: Cluster) -> None:
    await alone.add("p0")
    decode = await alone.add("d0")
    stop = text_at(14, 3)
    result = await answer(alone.generate(stop=StopConditions(max_tokens=400, stop=[stop])))
    assert (result.finished.reason, result.text) == (STOP, text_at(10, 4))
    assert result.finished.stop_string == stop
    assert result.token_ids == [token_at(10 + i) for i in range(7)]
    async with asyncio.timeout(5):
        await decode.cancelled.wait()


async def test_max_tokens_defaults_to_what_fits(cluster: Cluster) -> None:
    result = await answer(cluster.generate(token_ids=TokenIds(ids=[3] * 500)))
    assert (len(result.token_ids), result.finished.reason) == (12, LENGTH)


async def test_list_models(alone: Cluster) -> None:
    models = (await alone.stub.ListModels(ListModelsRequest())).models
    tiny = Model(
        id="tiny",
        revision=alone.model.revision,
        context_tokens=512,
        vocab_tokens=259,
        completion_tokens_max=1 << 15,
        chat=True,
    )
    assert list(models) == [tiny]
    for name in ("", "tiny"):
        assert (await alone.stub.GetModel(GetModelRequest(model=name))).model == tiny


async def test_health(alone: Cluster) -> None:
    health: Any = health_pb2_grpc.HealthStub(alone.channel)
    for name in ("", "zipserve.v1.InferenceService"):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == 1


NAN = math.nan
INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"token_ids": TokenIds()}, "prompt", "the prompt is empty"),
    ({"text": ""}, "prompt", "the prompt is empty"),
    ({"text": "x" * 512}, "prompt", "512 tokens; with at least one to generate it must stay within .* 512"),
    ({"token_ids": TokenIds(ids=[3] * 600)}, "prompt", "600 tokens"),
    ({"token_ids": TokenIds(ids=[3, 259])}, "token_ids.ids[1]", "259, must lie below the vocabulary's size of 259"),
    ({"chat": ChatPrompt()}, "chat.messages", "needs at least one"),
    ({"chat": ChatPrompt(messages=[ChatMessage(role="ghost")])}, "chat.messages", "unknown role ghost"),
    ({"chat": ChatPrompt(messages=[ChatMessage(role="")])}, "chat.messages[0].role", "role is ''"),
    ({"stop": StopConditions(max_tokens=0)}, "stop.max_tokens", "is 0, must be 1 to 32768"),
    ({"stop": StopConditions(max_tokens=503)}, "stop.max_tokens", "10 tokens and .* 503 are 513 .* context is 512"),
    ({"stop": StopConditions(stop=["x"] * 17)}, "stop.stop", "17 strings, at most 16"),
    ({"stop": StopConditions(stop=["x" * 257])}, "stop.stop[0]", "257 characters, must have 1 to 256"),
    ({"stop": StopConditions(stop=[""])}, "stop.stop[0]", "0 characters"),
    ({"stop": StopConditions(stop_token_ids=[259])}, "stop.stop_token_ids[0]", "below the vocabulary's size"),
    ({"sampling": SamplingParams(temperature=NAN)}, "sampling.temperature", "nan"),
    ({"sampling": SamplingParams(temperature=-1)}, "sampling.temperature", "-1"),
    ({"sampling": SamplingParams(temperature=math.inf)}, "sampling.temperature", "inf"),
    ({"sampling": SamplingParams(top_p=NAN)}, "sampling.top_p", "nan"),
    ({"sampling": SamplingParams(top_p=0)}, "sampling.top_p", "0"),
    ({"sampling": SamplingParams(min_p=1.5)}, "sampling.min_p", "1.5, must be between 0 and 1"),
    ({"sampling": SamplingParams(repetition_penalty=0)}, "sampling.repetition_penalty", "0.0, .* 0.0625 and 16"),
    ({"sampling": SamplingParams(presence_penalty=2.5)}, "sampling.presence_penalty", "2.5, .* -2 and 2"),
    ({"sampling": SamplingParams(frequency_penalty=NAN)}, "sampling.frequency_penalty", "nan, .* -2 and 2"),
    ({"sampling": SamplingParams(logit_bias={7: -101})}, "sampling.logit_bias[7]", "-101.0, .* -100 and 100"),
    (
        {"sampling": SamplingParams(logit_bias={259: 1})},
        "sampling.logit_bias[259]",
        "below the vocabulary's size of 259",
    ),
    ({"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1025), 1))}, "sampling.logit_bias", "1025 entries"),
    ({"sampling": SamplingParams(logprobs=21)}, "sampling.logprobs", "21, must be between 0 and 20"),
    ({"sampling": SamplingParams(prompt_logprobs=21)}, "sampling.prompt_logprobs", "21, must be between 0 and 20"),
    ({"stop": StopConditions(max_tokens=7, min_tokens=8)}, "stop.min_tokens", "8, must be at most the 7 tokens"),
    ({"stop": StopConditions(min_tokens=503)}, "stop.min_tokens", "503, must be at most the 502 tokens"),
]


async def test_invalid_requests(alone: Cluster) -> None:
    """They are refused while no worker is up, and leave nothing behind."""
    for request, field, message in INVALID:
        refused = await refusal(alone.generate(**request))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), request
        assert refused.field == field, request
        assert re.search(message, refused.message), refused.message
    await alone.at_rest()


async def test_no_prompt(alone: Cluster) -> None:
    refused = await refusal(alone.stub.Generate(GenerateRequest()))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")


async def test_unknown_model(alone: Cluster) -> None:
    refused = await refusal(alone.generate(model="gpt-9"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert refused.message == "model 'gpt-9' is not served; served: tiny"


async def test_malformed_bytes(alone: Cluster) -> None:
    call: Any = alone.channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)
    refused = await refusal(call(b"\xff\xff\xff no message", timeout=10))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_message_of_10_mb(alone: Cluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(alone.generate(text="x" * 10_000_000))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (caught.value.details() or "")
    assert await alone.stub.ListModels(ListModelsRequest())  # and the router goes on


async def test_a_long_prompt_does_not_stop_the_others(alone: Cluster) -> None:
    long = asyncio.create_task(refusal(alone.generate(text="word " * 200_000)))
    served = 0
    while not long.done():
        await alone.stub.ListModels(ListModelsRequest())
        served += 1
    assert (await long).field == "prompt"
    assert served > 10


async def test_no_worker(alone: Cluster) -> None:
    refused = await refusal(alone.generate())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
    assert refused.message == "no prefill worker is alive"
    await alone.add("p0")
    assert (await refusal(alone.generate())).message == "no decode worker is alive"


async def test_layouts_that_do_not_fit(alone: Cluster) -> None:
    await alone.add("p0")
    await alone.add("d0", layout=b"layout B")
    refused = await refusal(alone.generate())
    assert refused.reason == "NO_WORKER"
    assert "no decode worker reads what the prefill workers write (layouts: a fake layout)" in refused.message


async def test_too_many_requests(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, requests_max=1, queue_tokens_max=100, worker_wait_s=20)
    waiting = cluster.generate(stop=StopConditions(max_tokens=10))
    assert (await waiting.read()).WhichOneof("event") == "started"
    refused = await refusal(cluster.generate())
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refused.message == "1 requests are in flight, 1 is the limit"
    assert refused.retry_s == 1.0
    waiting.cancel()
    await cluster.at_rest()
    refused = await refusal(cluster.generate(stop=StopConditions(max_tokens=91)))
    assert refused.message == "prompt and max_tokens are 101 tokens, this router admits at most 100"


async def test_too_many_tokens(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, queue_tokens_max=100, worker_wait_s=20)
    waiting = cluster.generate(stop=StopConditions(max_tokens=50))
    assert (await waiting.read()).WhichOneof("event") == "started"
    refused = await refusal(cluster.generate(stop=StopConditions(max_tokens=50)))
    assert refused.reason == "OVERLOADED"
    assert refused.message == "the request needs 60 tokens, 60 of 100 are in flight"
    waiting.cancel()


async def test_unknown_method(alone: Cluster) -> None:
    call: Any = alone.channel.unary_unary("/zipserve.v1.InferenceService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_cancelled_stream_cancels_the_decode(alone: Cluster) -> None:
    prefill, decode = await alone.add("p0"), await alone.add("d0", at_token=_never_after(14))
    call = alone.generate(stop=StopConditions(max_tokens=400))
    seen = 0
    while seen < 3:
        seen += len((await call.read()).delta.token_ids)
    call.cancel()
    async with asyncio.timeout(5):
        await decode.cancelled.wait()
    await alone.at_rest()
    assert prefill.released == [], "the decode worker that has taken the handle over releases it"


async def test_a_cancelled_request_cancels_the_prefill(alone: Cluster) -> None:
    prefill = await alone.add("p0", before=_never)
    await alone.add("d0")
    call = alone.generate()
    await call.read()
    await until(lambda: len(prefill.requests) == 1, "prefill was asked")
    call.cancel()
    async with asyncio.timeout(5):
        await prefill.cancelled.wait()
    await alone.at_rest()


@pytest.mark.parametrize("where", ["prefill", "decode", "no worker"])
async def test_a_passed_deadline_ends_every_hop(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str, where: str
) -> None:
    cluster = await build(stack, model, redis_url, worker_wait_s=20)
    hop = None
    if where == "prefill":
        hop = await cluster.add("p0", before=_never)
        await cluster.add("d0")
    elif where == "decode":
        await cluster.add("p0")
        hop = await cluster.add("d0", at_token=_never_after(12))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(cluster.generate(timeout=0.5, stop=StopConditions(max_tokens=100)))
    assert caught.value.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
    await cluster.at_rest()
    if hop is not None:
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            await hop.cancelled.wait()


async def test_draining_refuses_new_requests_and_finishes_old_ones(alone: Cluster) -> None:
    gate = asyncio.Event()

    async def wait(_: object) -> None:
        await gate.wait()

    await alone.add("p0")
    await alone.add("d0", at_token=wait)
    events = aiter(alone.generate(stop=StopConditions(max_tokens=5)))
    first = await anext(events)
    alone.service.begin_drain()
    refused = await refusal(alone.generate())
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    draining = asyncio.create_task(alone.service.drained())
    gate.set()
    responses = [first, *[response async for response in events]]
    assert responses[-1].finished.usage.completion_tokens == 5
    async with asyncio.timeout(5):
        await draining


async def _never(_: object) -> None:
    await asyncio.Event().wait()


def _never_after(limit: int) -> Any:
    async def wait(position: object) -> None:
        assert isinstance(position, int)
        if position >= limit:
            await asyncio.Event().wait()

    return wait
