"""Completions over HTTP: the official client against a router with fake workers."""

from contextlib import AsyncExitStack
from typing import Any

import pytest

from http_router import HttpCluster, build_http, events_of
from router_peers import logprobs_at, text_at
from zipserve.common.models import ModelFiles


@pytest.fixture
async def router(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> HttpCluster:
    """With one worker of each kind."""
    router = await build_http(stack, model, redis_url)
    await router.workers()
    return router


async def test_a_whole_answer(router: HttpCluster) -> None:
    answer = await router.openai.completions.create(model="tiny", prompt="abc", max_tokens=4)
    choice = answer.choices[0]
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == (text_at(3, 4), 0, "length", None)
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "tiny", "cmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)


async def test_sixteen_tokens_are_the_default(router: HttpCluster) -> None:
    assert (await router.complete()).json()["usage"]["completion_tokens"] == 16
    assert (await router.complete(min_tokens=20)).json()["usage"]["completion_tokens"] == 20


async def test_a_stream(router: HttpCluster) -> None:
    stream = await router.openai.completions.create(
        model="tiny", prompt="abc", max_tokens=4, stream=True, stream_options={"include_usage": True}, echo=True
    )
    *chunks, usage = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc" + text_at(3, 4)
    reasons: list[Any] = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert (usage.choices, usage.usage and usage.usage.completion_tokens) == ([], 4)


async def test_a_list_of_prompts(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    router = await build_http(stack, model, redis_url)
    await router.workers(by_seed=True)
    asked: Any = {"model": "tiny", "prompt": ["abc", "x"], "n": 2, "seed": 3, "max_tokens": 5}
    answer = await router.openai.completions.create(**asked)
    texts = [text_at(3 + 3, 5), text_at(3 + 4, 5), text_at(1 + 3, 5), text_at(1 + 4, 5)]
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(texts))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 20)
    streamed = [""] * 4
    async for chunk in await router.openai.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize("prompt", [[67, 68, 69], [[67, 68, 69]], [[67, 68, 69], "abc"]])
async def test_prompts_of_ids(router: HttpCluster, prompt: Any) -> None:
    answer = (await router.complete(prompt=prompt, max_tokens=2, echo=True)).json()
    assert {choice["text"] for choice in answer["choices"]} == {"abc" + text_at(3, 2)}


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_with_echo(router: HttpCluster, stream: bool) -> None:
    response = await router.complete(prompt="aé", max_tokens=2, echo=True, logprobs=2, stream=stream)
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for answer in events_of(response.text) if stream else [response.json()]:
        for name, values in (answer["choices"][0]["logprobs"] or {}).items():
            found[name] += values
    assert found["tokens"] == ["a", "\ufffd", "\ufffd", "d", "e"]
    assert found["text_offset"] == [0, 1, 1, 2, 3]
    assert found["token_logprobs"] == [None, -1.0, -2.0, -3.0, -4.0]
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][3] == {"d": logprobs_at(3, 2).logprob, "<unk>": -3.0, "<s>": -4.0}


async def test_nothing_but_the_echo(router: HttpCluster) -> None:
    answer = (await router.complete(max_tokens=0, echo=True, logprobs=0)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert answer["usage"]["completion_tokens"] == 0


async def test_log_probabilities_of_the_prompt(router: HttpCluster) -> None:
    choice = (await router.complete(max_tokens=1, prompt_logprobs=0)).json()["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {"68": {"logprob": -1.0, "rank": None, "decoded_token": "b"}}
    assert choice["logprobs"] is None


async def test_an_error_of_one_prompt_is_that_of_all(router: HttpCluster) -> None:
    response = await router.complete(prompt=["abc", ""], stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt[1]"
    response = await router.complete(prompt=["abc", [1, 2, 999]])
    assert response.json()["error"]["message"] == ("prompt[1][2] is 999, must lie below the vocabulary's size of 259")
    await router.cluster.at_rest()
