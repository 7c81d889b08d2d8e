"""The four-process stack with the default model gives Hugging Face's tokens."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from oracle import Oracle
from processes import Processes
from prompts import real_prompts
from streams import Streamed, collect, request
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub

TOKENS = 64
CONCURRENT = 16


@pytest.mark.timeout(420)
async def test_greedy_tokens_of_forty_prompts_equal_hugging_face(
    redis_url: str, cluster: str, smollm2: Path, smollm2_tokenizer: Any, tmp_path: Path
) -> None:
    prompts = real_prompts(smollm2_tokenizer)
    limit = asyncio.Semaphore(CONCURRENT)

    async with Processes(redis_url, smollm2, tmp_path, cluster=cluster) as stack, ChannelPool(4 << 20) as channels:
        await stack.start("kvstore-0", "prefill-0", "decode-0", "router")
        stub = InferenceServiceStub(channels.get(stack.router))

        async def ask(prompt: list[int]) -> Streamed:
            async with limit:
                return await collect(stub, request(prompt, TOKENS), timeout_s=300)

        answers = await asyncio.gather(*map(ask, prompts))

    assert [len(answer.token_ids) for answer in answers] == [TOKENS] * len(prompts)
    assert not any(answer.finished.usage.replays for answer in answers)
    # every prompt but those of a single token has KV to move, and all of it moves
    assert [answer.finished.kv_transfer.tokens for answer in answers] == [len(prompt) for prompt in prompts]
    oracle = await asyncio.to_thread(Oracle, smollm2)
    for prompt, answer in zip(prompts, answers, strict=True):
        wrong = await asyncio.to_thread(oracle.first_wrong, prompt, answer.token_ids)
        assert wrong is None, f"token {wrong} after a prompt of {len(prompt)} tokens is not the greedy one"
    for prompt, answer in list(zip(prompts, answers, strict=True))[:6]:
        assert answer.token_ids == await asyncio.to_thread(oracle.generate, prompt, TOKENS)
