"""Chats over HTTP: the official client against a router with fake workers."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import router_model
from http_router import HttpCluster, build_http, events_of, speak
from router_peers import text_at
from zipserve.common.models import ModelFiles, resolve
from zipserve.router.caller import ANYBODY
from zipserve.v1.prefill_service_pb2 import PrefillRequest

PROMPT_TOKENS = 19
"""Of one message "x" in the tests' template."""
MESSAGES: Any = [{"role": "user", "content": "x"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich {\\"}"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
async def router(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> HttpCluster:
    """With one worker of each kind."""
    router = await build_http(stack, model, redis_url)
    await router.workers()
    return router


@pytest.fixture(scope="module")
def tools_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A model that knows tools."""
    folder = tmp_path_factory.mktemp("models") / "tools"
    return resolve(str(router_model.write(folder, chat_template=router_model.TOOLS_TEMPLATE, context_tokens=2048)))


@pytest.fixture
async def tools(stack: AsyncExitStack, tools_model: ModelFiles, redis_url: str) -> HttpCluster:
    """A router for it, with one worker of each kind."""
    router = await build_http(stack, tools_model, redis_url)
    await router.workers(context_tokens=2048)
    return router


async def says(router: HttpCluster, text: str, **fields: Any) -> None:
    """Lets the workers answer a chat of these fields with a text."""
    response = await router.http.post("/tokenize", json={"messages": MESSAGES, **fields})
    decode = router.cluster.peers
    speak(decode, text, response.json()["count"])


async def test_a_whole_answer(router: HttpCluster) -> None:
    answer = await router.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=5)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", text_at(PROMPT_TOKENS, 5))
    assert (choice.index, choice.finish_reason, choice.logprobs, choice.message.tool_calls) == (0, "length", None, None)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    assert answer.system_fingerprint == f"fp_{router.cluster.model.revision[:12]}"
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (PROMPT_TOKENS, 5, PROMPT_TOKENS + 5)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


async def test_a_stream(router: HttpCluster) -> None:
    stream = await router.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=7, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    first, *deltas, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == text_at(PROMPT_TOKENS, 7)
    assert {chunk.choices[0].finish_reason for chunk in deltas} == {None}
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("length", None)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (PROMPT_TOKENS, 7)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


async def test_the_synchronous_client(router: HttpCluster) -> None:
    def ask() -> str:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "stream": True}
        with (
            OpenAI(base_url=f"http://{router.address}/v1", api_key="none", max_retries=0) as client,
            client.chat.completions.create(**asked) as stream,
        ):
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == text_at(PROMPT_TOKENS, 3)


async def test_a_stream_says_of_no_usage_that_was_not_asked_for(router: HttpCluster) -> None:
    response = await router.chat(max_tokens=2, stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.text)
    assert not any("usage" in event for event in events)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_choices(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    router = await build_http(stack, model, redis_url)
    await router.workers(by_seed=True)
    asked: Any = {"model": "tiny", "messages": MESSAGES, "n": 3, "seed": 4, "max_tokens": 5}
    answer = await router.openai.chat.completions.create(**asked)
    texts = [text_at(PROMPT_TOKENS + 4 + i, 5) for i in range(3)]
    assert [(choice.index, choice.message.content) for choice in answer.choices] == list(enumerate(texts))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, 15)
    streamed = ["", "", ""]
    async for chunk in await router.openai.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


async def test_stop_strings(router: HttpCluster) -> None:
    stop = text_at(PROMPT_TOKENS + 4, 3)
    for given in (stop, ["zz", stop]):
        answer = (await router.chat(max_tokens=90, stop=given)).json()
        choice = answer["choices"][0]
        assert choice["message"]["content"] == text_at(PROMPT_TOKENS, 4)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(router: HttpCluster, stream: bool) -> None:
    response = await router.chat(max_tokens=3, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        choices = [event["choices"][0] for event in events_of(response.text)]
        found = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    else:
        found = response.json()["choices"][0]["logprobs"]["content"]
    letters = text_at(PROMPT_TOKENS, 3)
    assert [(entry["token"], entry["logprob"], bytes(entry["bytes"])) for entry in found] == [
        (letter, float(-PROMPT_TOKENS - i), letter.encode()) for i, letter in enumerate(letters)
    ]
    tops = [(top["token"], top["logprob"]) for top in found[1]["top_logprobs"]]
    assert tops == [("<unk>", float(-PROMPT_TOKENS - 1)), ("<s>", float(-PROMPT_TOKENS - 2))]


async def test_the_token_that_ends_has_no_log_probability(router: HttpCluster) -> None:
    await says(router, "ab")
    choice = (await router.chat(logprobs=True, max_tokens=9)).json()["choices"][0]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b"]
    assert choice["finish_reason"] == "stop"


async def test_log_probabilities_of_the_prompt(router: HttpCluster) -> None:
    answer = (await router.chat(max_tokens=1, prompt_logprobs=1)).json()
    told = answer["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == PROMPT_TOKENS
    assert told[1]["0"] == {"logprob": -1.0, "rank": 1, "decoded_token": "<unk>"}


async def test_every_parameter_reaches_the_workers(router: HttpCluster) -> None:
    await router.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=7, temperature=0.5, top_p=0.25, seed=-2, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"7": -2}, logprobs=True, top_logprobs=3, user="somebody",
        extra_body={
            "top_k": 5, "min_p": 0.125, "repetition_penalty": 1.5, "stop_token_ids": [9], "ignore_eos": True,
            "min_tokens": 2, "priority": 4, "cache_salt": "salt",
        },
    )  # fmt: skip
    asked = router.cluster.peers[0].requests[0]
    assert isinstance(asked, PrefillRequest)
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 5, 0.125)
    assert sampling.seed == (1 << 64) - 2
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert dict(sampling.logit_bias) == {7: -2}
    assert sampling.logprobs == 3
    assert list(asked.stop_token_ids) == [9]
    # vLLM's priorities fall
    assert (asked.min_tokens, asked.priority, asked.cache_salt) == (2, -4, ANYBODY.salt("salt"))


async def test_parts_names_and_roles(tools: HttpCluster) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "c"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "warm"},
    ]
    told = await tools.http.post("/tokenize", json={"messages": messages, "chat_template_kwargs": {"shout": True}})
    text = (await tools.http.post("/detokenize", json={"tokens": told.json()["tokens"]})).json()["prompt"]
    said = "system:be brief" + "user(ann):a\nb" + "assistant:<tool_call>f=c</tool_call>" + "tool[1]:warm" + "!"
    assert text == said + "assistant:"


async def test_the_last_message_can_be_continued(tools: HttpCluster) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I th"}]

    async def rendered(**fields: Any) -> str:
        told = (await tools.http.post("/tokenize", json={"messages": messages, **fields})).json()
        return str((await tools.http.post("/detokenize", json={"tokens": told["tokens"]})).json()["prompt"])

    assert await rendered(continue_final_message=True) == "user:xassistant:I th"
    assert await rendered(add_generation_prompt=False) == "user:xassistant:I th"
    assert await rendered() == "user:xassistant:I thassistant:"


async def test_tool_calls(tools: HttpCluster) -> None:
    await says(tools, CALLS, tools=TOOLS)
    answer = await tools.openai.chat.completions.create(model="tools", messages=MESSAGES, tools=TOOLS, max_tokens=400)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [("function", "weather"), ("function", "time")]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": 'Zürich {"}'}, {}]
    assert len({call.id for call in calls}) == 2


async def test_streamed_tool_calls(tools: HttpCluster) -> None:
    await says(tools, CALLS, tools=TOOLS)
    stream = await tools.openai.chat.completions.create(
        model="tools", messages=MESSAGES, tools=TOOLS, max_tokens=400, stream=True, logprobs=True
    )
    text, calls, tokens, finish = "", [("", "", "")] * 2, "", ""
    async for chunk in stream:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        if choice.logprobs is not None and choice.logprobs.content is not None:
            tokens += "".join(chr(byte) for entry in choice.logprobs.content for byte in entry.bytes or [])
        for call in choice.delta.tool_calls or []:
            identity, name, arguments = calls[call.index]
            assert call.function is not None
            calls[call.index] = (
                identity + (call.id or ""), name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            )  # fmt: skip
        finish = choice.finish_reason or finish
    assert text == "Let me see."
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == [
        ("weather", {"city": 'Zürich {"}'}),
        ("time", {}),
    ]
    assert all(identity.startswith("call_") for identity, _, _ in calls)
    assert finish == "tool_calls"
    assert tokens.encode("latin-1").decode() == CALLS


async def test_the_tool_that_must_be_called(tools: HttpCluster) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    await says(tools, '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', tools=TOOLS)
    answer = (await tools.chat(tools=TOOLS, tool_choice=named, max_tokens=90)).json()["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}
    assert (answer["message"]["content"], answer["finish_reason"]) == (None, "tool_calls")


async def test_one_call_at_a_time(tools: HttpCluster) -> None:
    await says(tools, CALLS, tools=TOOLS)
    answer = (await tools.chat(tools=TOOLS, parallel_tool_calls=False, max_tokens=400)).json()["choices"][0]
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["weather"]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("tool_calls", None)


async def test_without_a_choice_of_tools_calls_are_text(tools: HttpCluster) -> None:
    await says(tools, CALLS)
    answer = (await tools.chat(tools=TOOLS, tool_choice="none", max_tokens=400)).json()["choices"][0]
    assert answer["message"]["content"] == CALLS
    assert "tool_calls" not in answer["message"]
    assert answer["finish_reason"] == "stop"


async def test_an_answer_that_is_sent_back_is_understood(tools: HttpCluster, tmp_path: Path) -> None:
    await says(tools, CALLS, tools=TOOLS)
    asked: Any = {"model": "tools", "tools": TOOLS, "max_tokens": 400}
    message = (await tools.openai.chat.completions.create(messages=MESSAGES, **asked)).choices[0].message
    calls: Any = message.tool_calls
    messages: Any = [*MESSAGES, message, {"role": "tool", "tool_call_id": calls[0].id, "content": "warm"}]
    assert (await tools.openai.chat.completions.create(messages=messages, **asked)).choices[0].message.content
