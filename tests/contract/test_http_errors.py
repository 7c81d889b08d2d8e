"""What the HTTP side refuses, and how: each unknown or unsupported field by its name and value, in OpenAI's shape."""

import asyncio
import re
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest

from http_router import HttpCluster, build_http
from zipserve.common.errors import UnauthenticatedError
from zipserve.common.metrics import Metrics
from zipserve.common.models import ModelFiles
from zipserve.router.caller import Caller
from zipserve.router.http.app import Api
from zipserve.router.http.server import HttpServer

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}


@pytest.fixture
async def router(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> HttpCluster:
    """Without workers: what cannot succeed is refused all the same."""
    return await build_http(stack, model, redis_url)


# Fields that a request has besides its prompt, the one that is refused, and what is said.
OF_BOTH: list[tuple[dict[str, Any], str, str]] = [
    ({"unheard_of": {"a": 1}}, "unheard_of", r'unheard_of is {"a":1}, but there is no such field'),
    ({"temperature": -1}, "temperature", r"temperature is -1.0, must be between 0 and 100"),
    ({"temperature": "hot"}, "temperature", r'temperature is "hot", must be a valid number'),
    ({"top_p": 0}, "top_p", r"top_p is 0.0, must be above 0"),
    ({"top_k": -2}, "top_k", r"top_k is -2, must be greater than or equal to -1"),
    ({"min_p": 1.5}, "min_p", r"min_p is 1.5, must be between 0 and 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", r"is 0.0, must be between 0.0625 and 16"),
    ({"presence_penalty": 2.5}, "presence_penalty", r"is 2.5, must be between -2 and 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", r"is -2.5"),
    ({"logit_bias": {"7": 101}}, "logit_bias[7]", r"logit_bias\[7\] is 101.0, must be between -100 and 100"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", r'logit_bias.a is "a"'),
    ({"logit_bias": {"259": 1}}, "logit_bias[259]", r"below the vocabulary's size of 259"),
    ({"n": 0}, "n", r"n is 0, must be at least 1"),
    ({"n": 17}, "n", r"n is 17, must be 1 to 16"),
    ({"seed": 1.5}, "seed", r"seed is 1.5, must be a valid integer"),
    ({"max_tokens": 40_000}, "max_tokens", r"max_tokens is 40000, must be 1 to 32768"),
    ({"max_tokens": 512}, "max_tokens", r"the model's context is 512"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", r"min_tokens is 9, must be at most the 8 tokens"),
    ({"stop": 3}, "stop", r"stop is 3, must be a string or a list of strings"),
    ({"stop": ""}, "stop[0]", r"stop\[0\] has 0 characters"),
    ({"stop": ["x"] * 17}, "stop", r"has 17 strings, at most 16"),
    ({"stop_token_ids": [259]}, "stop_token_ids[0]", r"stop_token_ids\[0\] is 259"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", r"prompt_logprobs is 21, must be between 0 and 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", r"which a stream does not tell"),
    ({"cache_salt": "x" * 257}, "cache_salt", r"257 characters, at most 256"),
    ({"priority": 1 << 31}, "priority", r"must be less than 2147483648"),
    ({"priority": -(1 << 31)}, "priority", r"priority is -2147483648"),
    ({"stream_options": {"include_usage": True}}, "stream_options", r"needs stream to be true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", r"no such field"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        r"does not support",
    ),
    ({"response_format": {"type": "yaml"}}, "response_format.type", r'"yaml", must be one of \'text\''),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", r"is missing"),
    ({"guided_json": 3}, "guided_json", r"guided_json is 3, must be a JSON Schema"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", r"guided_regex and guided_choice are set"),
    ({"guided_regex": "("}, "guided_regex", r"^guided_regex"),
    ({"guided_choice": []}, "guided_choice", r"guided_choice has 0 texts"),
    (
        {"structured_outputs": {"grammar": "start: nothing"}},
        "structured_outputs.grammar",
        r"^structured_outputs.grammar",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nope"}}}},
        "response_format",
        r"^response_format",
    ),
    ({"structured_outputs": {"ebnf": "x"}}, "structured_outputs.ebnf", r"no such field"),
]
OF_CHAT: list[tuple[dict[str, Any], str, str]] = [
    *[
        ({name: {"x": 1}}, name, rf"{name} is .*which this server does not support")
        for name in (
            "audio",
            "function_call",
            "functions",
            "metadata",
            "moderation",
            "prediction",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning_effort",
            "verbosity",
            "web_search_options",
        )
    ],
    ({"modalities": ["audio"]}, "modalities[0]", r"must be 'text'"),
    ({"service_tier": "flex"}, "service_tier", r'"flex", must be \'auto\' or \'default\''),
    ({"store": True}, "store", r"store is true"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", r"at most one of them may be set"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", r"max_completion_tokens is 0, must be 1"),
    ({"top_logprobs": 2}, "top_logprobs", r"top_logprobs is 2, needs logprobs to be true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", r"top_logprobs is 21, must be between 0 and 20"),
    ({"logprobs": 2}, "logprobs", r"must be a valid boolean"),
    ({"messages": []}, "messages", r"messages is \[\]"),
    ({"messages": [{"role": "ghost", "content": "x"}]}, "messages[0].role", r'"ghost", must be one of'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", r"is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", r"is null"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", r"is null"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", r"no such field"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", r"is missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "messages[0].content",
        r'part 0 is of type "image_url"; only parts of type "text" are supported',
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", r"part 0 must be"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        "messages[0].tool_calls[0].arguments",
        r"'\[\]', must be a JSON object",
    ),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", r"618 tokens; .* context of 512"),
    ({"continue_final_message": True}, "continue_final_message", r"role 'user', must be of 'assistant'"),
    (
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": "y"}],
            "continue_final_message": True,
            "add_generation_prompt": True,
        },
        "add_generation_prompt",
        r"exclude each other",
    ),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs[tokenize]", r"'tokenize', which is not"),
    ({"tools": [TOOL]}, "tools", r"tools has 1 tools; this model's chat template knows none"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type", r'"custom", must be \'function\''),
    ({"tools": [TOOL, TOOL]}, "tools", r"tools has 'f' twice"),
    ({"tool_choice": "auto"}, "tool_choice", r"needs tools, there are none"),
    ({"tool_choice": "maybe", "tools": [TOOL]}, "tool_choice", r'tool_choice is "maybe", must be'),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
        "tool_choice",
        r"'g', which is none of the tools",
    ),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", r"needs tools, there are none"),
]
OF_COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", r"prompt is null, must be a string, a list of token ids"),
    ({"prompt": []}, "prompt", r"prompt is \[\]"),
    ({"prompt": [1, "x"]}, "prompt", r'prompt is \[1,"x"\]'),
    ({"prompt": [-1]}, "prompt", r"prompt is \[-1\]"),
    ({"prompt": ""}, "prompt", r"the prompt is empty"),
    ({"prompt": [3, 259]}, "prompt[1]", r"prompt\[1\] is 259"),
    ({"prompt": [3, 259], "echo": True}, "prompt[1]", r"prompt\[1\] is 259"),
    ({"prompt": ["x"] * 129}, "prompt", r"has 129 prompts, at most 128"),
    ({"suffix": "y"}, "suffix", r'suffix is "y", which this server does not support'),
    ({"best_of": 3, "n": 2}, "best_of", r"best_of is 3; .* must be n, which is 2"),
    ({"logprobs": 21}, "logprobs", r"logprobs is 21, must be between 0 and 20"),
    ({"logprobs": True}, "logprobs", r"must be a valid integer"),
    ({"echo": True, "logprobs": 21}, "logprobs", r"logprobs is 21"),
    ({"max_tokens": 0}, "max_tokens", r"max_tokens is 0, which needs echo to be true"),
    ({"messages": MESSAGES}, "messages", r"no such field"),
]


async def _is_refused(router: HttpCluster, path: str, body: Any, param: str | None, message: str) -> None:
    response = await router.http.post(path, json=body)
    assert response.status_code == 400, (body, response.text)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert error["param"] == param, (body, error)
    assert re.search(message, error["message"]), error["message"]


async def test_what_chats_refuse(router: HttpCluster) -> None:
    for fields, param, message in OF_BOTH + OF_CHAT:
        await _is_refused(router, CHAT, {"messages": MESSAGES, **fields}, param, message)
    await _is_refused(router, CHAT, {}, "messages", "messages is missing")
    await router.cluster.at_rest()


async def test_what_completions_refuse(router: HttpCluster) -> None:
    for fields, param, message in OF_BOTH + OF_COMPLETION:
        await _is_refused(router, COMPLETION, {"prompt": "x", **fields}, param, message)
    await _is_refused(router, COMPLETION, {}, "prompt", "prompt is missing")
    await router.cluster.at_rest()


async def test_what_the_tokenizer_refuses(router: HttpCluster) -> None:
    await _is_refused(router, "/tokenize", {}, "prompt", "prompt is missing")
    await _is_refused(router, "/tokenize", {"prompt": "x", "a": 1}, "a", "no such field")
    await _is_refused(router, "/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role", "must be one of")
    await _is_refused(router, "/tokenize", {"messages": MESSAGES, "tools": [TOOL]}, "tools", "knows none")
    await _is_refused(router, "/detokenize", {"tokens": [3, 259]}, "tokens[1]", r"tokens\[1\] is 259, must lie below")
    await _is_refused(router, "/detokenize", {"tokens": ["x"]}, "tokens[0]", "must be a valid integer")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"prompt": "x", "top_p": NaN}', "top_p is NaN, must be a finite number"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature is Infinity"),
    ],
)
async def test_bodies_that_are_none(router: HttpCluster, body: bytes, message: str) -> None:
    response = await router.http.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


async def test_other_kinds_of_bodies(router: HttpCluster) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        response = await router.http.post(COMPLETION, content=b'{"prompt": "x"}', headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(router: HttpCluster, chunked: bool) -> None:
    limit = router.cluster.settings.http_body_bytes_max

    async def pieces() -> Any:
        for _ in range(limit // 65536 + 2):
            yield b"x" * 65536

    content: Any = pieces() if chunked else b"x" * (limit + 1)
    response = await router.http.post(COMPLETION, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert f"at most {limit} are allowed" in response.json()["error"]["message"]
    assert (await router.http.get("/health")).status_code == 200


async def test_paths_and_methods_that_are_not_there(router: HttpCluster) -> None:
    for method, path, status in [
        ("GET", "/v1/embeddings", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
    ]:
        response = await router.http.request(method, path)
        assert response.status_code == status
        error = response.json()["error"]
        assert (error["type"], error["message"].split(":")[0]) == ("invalid_request_error", f"{method} {path}")


async def test_a_model_that_is_not_served(router: HttpCluster) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await router.openai.completions.create(model="gpt-9", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="'org/other' is not served; served: tiny"):
        await router.openai.models.retrieve("org/other")


async def test_no_worker(router: HttpCluster) -> None:
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            await router.openai.completions.create(model="tiny", prompt="x", stream=stream)
        assert (caught.value.status_code, caught.value.code) == (503, "no_worker")


async def test_overload_says_when_to_come_back(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    router = await build_http(stack, model, redis_url, requests_max=1, worker_wait_s=20)
    waiting = router.cluster.generate()
    await waiting.read()
    response = await router.complete()
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"] == "1 requests are in flight, 1 is the limit"
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "1000")
    waiting.cancel()


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [("0", 504, "deadline_exceeded"), ("-1", 504, "deadline_exceeded"), ("0.2", 504, "deadline_exceeded")]
    + [(given, 400, "invalid_request") for given in ("soon", "nan", "")],
)
async def test_deadlines(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str, given: str, status: int, code: str
) -> None:
    async def never(_: object) -> None:
        await asyncio.Event().wait()

    router = await build_http(stack, model, redis_url)
    await router.workers(before=never)
    headers = {"x-request-timeout-s": given}
    for stream in (False, True):
        body = {"prompt": "x", "stream": stream}
        response = await router.http.post(COMPLETION, json=body, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    await router.cluster.at_rest()


async def test_a_defect_of_ours_shows_nothing_of_it(router: HttpCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(router.cluster.frontend, "served", broken)
    response = await router.http.get("/v1/models")
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal")
    assert "secret" not in response.text


async def test_keys(router: HttpCluster, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Caller] = []

    def authenticate(header: str | None) -> Caller:
        if header != "Bearer right":
            raise UnauthenticatedError("the key is missing or unknown")
        return Caller(name="ann")

    def generate(request: Any, request_id: str, deadline: Any, caller: Caller, *_: Any) -> Any:
        seen.append(caller)
        raise UnauthenticatedError("far enough")

    frontend, settings = router.cluster.frontend, router.cluster.settings
    api = Api(frontend, frontend._tokenizer, settings, Metrics(), authenticate)
    server = await HttpServer.start(api.app(), "127.0.0.1:0", connections_max=9, unread_s=9)
    stack.push_async_callback(server.stop)
    http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://{server.address}"))
    monkeypatch.setattr(router.cluster.frontend, "generate", generate)
    for method, path in [
        ("POST", CHAT), ("POST", COMPLETION), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/metrics"),
    ]:  # fmt: skip
        response = await http.request(method, path)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/version"):
        assert (await http.get(path)).status_code == 200
    response = await http.post(COMPLETION, json={"prompt": "x"}, headers={"authorization": "Bearer right"})
    assert response.json()["error"]["message"] == "far enough"
    assert seen == [Caller(name="ann")]
