"""The default codec on the default model, through four processes: the bytes that travel, and the answers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from processes import Processes
from prompts import LICENCE, real_prompts
from streams import Stub, collect, request
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.worker_service_pb2 import WorkerRole

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(300)]

FP16_TOKEN_BYTES = 30 * 3 * (64 + 64) * 2
"""Of one token of SmolLM2-135M: layers, KV heads, keys and values."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(redis_url: str, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Processes]:
    logs = tmp_path_factory.mktemp("zipped")
    async with Processes(redis_url, smollm2, logs, cluster="zipped", codec="zip-4/32") as processes:
        await processes.start("kvstore-0", "prefill-0", "decode-0", "router")
        yield processes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(stack: Processes) -> AsyncIterator[Stub]:
    async with ChannelPool(4 << 20) as channels:
        yield InferenceServiceStub(channels.get(stack.router))


@pytest.mark.parametrize(("tokens", "ratio"), [(1000, 3.9), (4000, 4.5)])
async def test_fewer_bytes_than_fp16_travel(stub: Stub, smollm2_tokenizer: Any, tokens: int, ratio: float) -> None:
    """Blocks, sinks, tail and headers, as NIXL has counted them."""
    text = LICENCE.read_text() * 2
    prompt = smollm2_tokenizer(text, add_special_tokens=False).input_ids[:tokens]
    assert len(prompt) == tokens
    answer = await collect(stub, request(prompt, 2), timeout_s=240.0)
    moved = answer.finished.kv_transfer
    assert moved.tokens == tokens
    assert FP16_TOKEN_BYTES * tokens / moved.bytes >= ratio


async def test_questions_are_answered(stack: Processes, stub: Stub, smollm2_tokenizer: Any) -> None:
    """Beside long prompts, so that zipped blocks of many sequences are read in one step; all slabs come back."""
    prompts = sorted(real_prompts(smollm2_tokenizer), key=len)
    texts = [smollm2_tokenizer.decode(prompt) for prompt in prompts]
    france = next(i for i, text in enumerate(texts) if "capital of France" in text)
    chosen = [prompts[france], *prompts[-6:]]
    answers = await asyncio.gather(*(collect(stub, request(prompt, 24), timeout_s=240.0) for prompt in chosen))
    assert [len(answer.token_ids) for answer in answers] == [24] * len(chosen)
    assert "Paris" in answers[0].text
    again = await collect(stub, request(prompts[france], 24))
    assert "Paris" in again.text
    for role in (WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE):
        for record in stack.workers(role):
            load = record.load
            assert (load.free_blocks, load.free_sinks) == (load.total_blocks, load.total_sinks)
            assert load.total_sinks > 0
