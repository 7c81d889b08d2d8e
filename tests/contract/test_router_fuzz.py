"""Requests that nobody would send, by the thousand: refused with a reason, never answered with a failure of ours, and
nothing is left of them."""

import asyncio
import gc
import json
import random
import string
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import pytest

from http_router import build_http
from zipserve.common.models import ModelFiles
from zipserve.v1.inference_service_pb2 import (
    ChatMessage,
    ChatPrompt,
    DetokenizeRequest,
    GenerateRequest,
    GenerateUnaryRequest,
    GetModelRequest,
    TokenIds,
    TokenizeRequest,
    ToolCall,
)
from zipserve.v1.sampling_pb2 import Guide, SamplingParams, StopConditions

REQUESTS = 5000
"""By HTTP, and as many by gRPC."""
AT_ONCE = 32
MEANT = {200, 400, 404, 413, 415, 429}
MEANT_GRPC = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

MESSAGES = [{"role": "user", "content": "x"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
SCHEMA = {"name": "a", "schema": {"type": "object"}}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": MESSAGES, "max_tokens": 4, "temperature": 0.5, "n": 2, "stop": ["a"], "seed": 1},
        {"messages": MESSAGES, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "stream": True},
        {"messages": MESSAGES, "max_tokens": 2, "response_format": {"type": "json_schema", "json_schema": SCHEMA}},
        {"messages": PARTS, "max_tokens": 2, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": PARTS, "max_tokens": 2, "tool_choice": "none", "chat_template_kwargs": {"a": 1}},
    ],
    "/v1/completions": [
        {"prompt": "ab", "max_tokens": 3, "echo": True, "logprobs": 2, "logit_bias": {"7": 1.5}},
        {"prompt": ["ab", "c"], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": "c", "max_tokens": 3, "presence_penalty": 1, "frequency_penalty": -1, "best_of": 1},
        {"prompt": [3, 4, 5], "max_tokens": 3, "top_k": 4, "min_p": 0.1, "priority": 1, "cache_salt": "s"},
        {"prompt": [[3, 4], [5]], "max_tokens": 2, "stop_token_ids": [9], "min_tokens": 1, "guided_regex": "[ab]+"},
    ],
    "/tokenize": [{"prompt": "ab"}, {"messages": MESSAGES}],
    "/detokenize": [{"tokens": [3, 4, 5]}],
}

GENERATE = GenerateRequest(
    token_ids=TokenIds(ids=[3, 4, 5]),
    sampling=SamplingParams(temperature=0.5, top_k=3, top_p=0.9, seed=7, min_p=0.1, logit_bias={7: 1.0}, logprobs=2),
    stop=StopConditions(max_tokens=4, stop=["ab", "c"], stop_token_ids=[9], min_tokens=1),
    n=2,
    priority=3,
    cache_salt="s",
)
CHAT = GenerateRequest(
    chat=ChatPrompt(
        messages=[ChatMessage(role="user", content="é", name="n", tool_calls=[ToolCall(id="1", name="f")])]
    ),
    sampling=SamplingParams(prompt_logprobs=1, repetition_penalty=1.1, presence_penalty=1, frequency_penalty=-1),
    stop=StopConditions(max_tokens=3, ignore_eos=True),
    guide=Guide(regex="[ab]+"),
)
CALLS: dict[str, list[Any]] = {
    "Generate": [GENERATE, CHAT],
    "GenerateUnary": [GenerateUnaryRequest(request=GENERATE), GenerateUnaryRequest(request=CHAT)],
    "Tokenize": [TokenizeRequest(text="ab"), TokenizeRequest(chat=CHAT.chat)],
    "Detokenize": [DetokenizeRequest(token_ids=[3, 4, 5])],
    "GetModel": [GetModelRequest(model="tiny")],
}


def wild(dice: random.Random, depth: int = 0) -> Any:
    """Any JSON value, and the odd one that only nearly is one."""
    simple: list[Callable[[], Any]] = [
        lambda: None,
        lambda: dice.random() < 0.5,
        lambda: dice.choice([0, 1, -1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 16, 17, 258, 259]),
        lambda: dice.choice([0.0, -0.5, 1.5, 1e308, -1e308, 1e-300, float("inf"), float("-inf"), float("nan")]),
        lambda: "".join(dice.choices(string.printable + "é日👩\u0301\ufffd\ud800", k=dice.randrange(6))),
        lambda: dice.choice(["", "auto", "required", "json_object", "text", "a" * 300, "{", "[", "(", "\\", "tiny"]),
    ]
    if depth < 3 and dice.random() < 0.3:
        if dice.random() < 0.5:
            return [wild(dice, depth + 1) for _ in range(dice.randrange(4))]
        return {dice.choice(["type", "text", "role", "content", "name", "a", ""]): wild(dice, depth + 1)}
    return dice.choice(simple)()


def spoiled(dice: random.Random, body: Any) -> Any:
    """A copy in which something is other than it should be, at any depth."""
    if isinstance(body, dict) and body and dice.random() < 0.85:
        name = dice.choice(list(body))
        match dice.randrange(4):
            case 0:
                return {key: value for key, value in body.items() if key != name}
            case 1:
                return {**body, dice.choice(["messages", "suffix", "best_of", "n", "stop", "user", "x"]): wild(dice)}
            case _:
                return {**body, name: spoiled(dice, body[name])}
    if isinstance(body, list) and body and dice.random() < 0.7:
        at = dice.randrange(len(body))
        return [*body[:at], spoiled(dice, body[at]), *body[at + dice.randrange(2) :]]
    return wild(dice)


def encoded(dice: random.Random, body: Any) -> bytes:
    """As JSON; sometimes cut or with bytes that were changed."""
    text = json.dumps(body).encode()
    return mutated(dice, text) if dice.random() < 0.1 else text


def mutated(dice: random.Random, data: bytes) -> bytes:
    """Bytes of a message, of which some were changed, lost or put in twice."""
    changed = bytearray(data)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(changed) + 1)
        match dice.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del changed[at : at + dice.randrange(1, 5)]
            case 2:
                changed[at:at] = changed[at : at + dice.randrange(1, 9)]
            case _:
                changed[at:at] = dice.randbytes(dice.randrange(1, 4))
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_ten_thousand_requests(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    router = await build_http(stack, model, redis_url, log_level="error", prefix_names_max=0)
    await router.workers(end_at=14)
    dice = random.Random(1)
    turns = asyncio.Semaphore(AT_ONCE)
    statuses: Counter[Any] = Counter()

    async def post(path: str, body: bytes) -> None:
        async with turns:
            answer = await router.http.post(path, content=body, headers={"content-type": "application/json"})
        statuses[answer.status_code] += 1
        assert answer.status_code in MEANT, (path, body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"], (path, body)

    async def call(method: str, message: bytes) -> None:
        name = f"/zipserve.v1.InferenceService/{method}"
        channel: Any = router.cluster.channel
        async with turns:
            if method == "Generate":
                stream = channel.unary_stream(name)(message, timeout=20)
                with suppress(grpc.aio.AioRpcError):
                    while await stream.read() is not grpc.aio.EOF:
                        pass
                code, details = await stream.code(), await stream.details()
            else:
                unary = channel.unary_unary(name)(message, timeout=20)
                code, details = await unary.code(), await unary.details()
        statuses[code] += 1
        assert code in MEANT_GRPC, (method, message, details)

    async def send(count: int) -> None:
        for _ in range(count // 500):
            async with asyncio.TaskGroup() as group:
                for _ in range(500):
                    path = dice.choice(list(BODIES))
                    body = encoded(dice, spoiled(dice, dice.choice(BODIES[path])))
                    group.create_task(post(path, body))
                    method = dice.choice(list(CALLS))
                    group.create_task(call(method, mutated(dice, dice.choice(CALLS[method]).SerializeToString())))

    await send(500)
    await router.cluster.at_rest()
    before = _alive()
    await send(REQUESTS - 500)
    await router.cluster.at_rest()
    for peer in router.cluster.peers:
        peer.requests.clear()
    assert _alive() - before < 2000, "objects are left of some requests"
    assert statuses.total() == 2 * REQUESTS
    assert statuses[200] > 100 < statuses[400], statuses
    assert statuses[grpc.StatusCode.OK] > 100 < statuses[grpc.StatusCode.INVALID_ARGUMENT], statuses
    answer = await router.complete(max_tokens=3)
    assert answer.status_code == 200


def _alive() -> int:
    gc.collect()
    return len(gc.get_objects())
