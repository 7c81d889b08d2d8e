"""The official OpenAI client against the real stack: four processes, the default model."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from polling import until
from processes import Processes
from zipserve.v1.worker_service_pb2 import WorkerRole

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(redis_url: str, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Processes]:
    logs = tmp_path_factory.mktemp("openai")
    overrides = (("router", "http_listen", "127.0.0.1:0"),)
    async with Processes(redis_url, smollm2, logs, cluster="openai", overrides=overrides) as processes:
        await processes.start("kvstore-0", "prefill-0", "decode-0", "router")
        yield processes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: Processes) -> AsyncIterator[AsyncOpenAI]:
    found = re.search(r'"address": "([^"]+)".*"http.ready"|"http.ready".*"address": "([^"]+)"', stack.log("router"))
    assert found is not None
    address = found[1] or found[2]
    async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        yield client


async def idle(stack: Processes, *, within_s: float) -> None:
    """Returns when no worker computes, and all tails are free."""

    def free() -> bool:
        loads = [
            record.load
            for role in (WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE)
            for record in stack.workers(role)
        ]
        return len(loads) == 2 and not any(
            load.running_requests or load.queued_requests or load.leases or load.free_tails < load.total_tails
            for load in loads
        )

    await until(free, "the workers hold nothing", timeout_s=within_s)


async def test_a_chat(client: AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    answer = await client.chat.completions.create(model=model.id, messages=QUESTION, temperature=0, max_tokens=32)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


async def test_a_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="", messages=QUESTION, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True},
        logprobs=True, top_logprobs=1,
    )  # fmt: skip
    text, tokens, usage = "", b"", None
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            for entry in (choice.logprobs and choice.logprobs.content) or []:
                tokens += bytes(entry.bytes or [])
                assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    assert text == tokens.decode() == ANSWER
    assert usage is not None
    assert usage.completion_tokens == 8


async def test_completions_with_echo_and_log_probabilities(client: AsyncOpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    answer = await client.completions.create(
        model="", prompt=prompts, temperature=0, max_tokens=4, echo=True, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        assert choice.text.startswith(prompt)
        assert len(choice.text) > len(prompt)
        found: Any = choice.logprobs
        assert "".join(found.tokens) == choice.text
        offsets = [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
        assert found.text_offset == offsets
        assert found.token_logprobs[0] is None
        assert all(logprob <= 0 for logprob in found.token_logprobs[1:])
    assert " four" in answer.choices[1].text


async def test_a_dropped_connection_frees_everything(stack: Processes, client: AsyncOpenAI) -> None:
    await idle(stack, within_s=15)
    asked: Any = {"model": "", "prompt": "Once upon a time", "max_tokens": 2_000, "extra_body": {"ignore_eos": True}}
    stream = await client.completions.create(**asked, stream=True)
    assert (await anext(stream)).choices
    await stream.close()
    # heartbeats tell of it a little later than it is
    await idle(stack, within_s=1.5)
