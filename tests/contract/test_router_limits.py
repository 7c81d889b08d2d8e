"""What a request may ask for, and that one whose deadline cannot be met is refused at once."""

import asyncio
import time
from contextlib import AsyncExitStack, aclosing

import grpc
import pytest

from polling import until
from router_cluster import PROMPT, answer, build, refusal
from zipserve.common.errors import OverloadedError
from zipserve.common.models import ModelFiles
from zipserve.router.caller import Caller
from zipserve.router.frontend import Started
from zipserve.v1.inference_service_pb2 import GenerateRequest
from zipserve.v1.sampling_pb2 import StopConditions

STOP = StopConditions(max_tokens=5)


async def test_a_hopeless_deadline(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url)
    prefill = await cluster.add("p0", prefill_tokens_per_s=1.0)
    await cluster.add("d0")
    started_s = time.monotonic()
    refused = await refusal(cluster.generate(timeout=4.5, stop=STOP))
    assert time.monotonic() - started_s < 2.0, "at once, not when the time is over"
    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert "takes 5.00 s at least, the deadline is in 4." in refused.message
    assert prefill.requests == []
    assert len((await answer(cluster.generate(timeout=20, stop=STOP))).token_ids) == 5
    await cluster.at_rest()


async def test_what_waits_before_it_makes_a_deadline_hopeless(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    cluster = await build(stack, model, redis_url)
    gate = asyncio.Event()

    async def wait(_: object) -> None:
        await gate.wait()

    prefill = await cluster.add("p0", prefill_tokens_per_s=1.0, queued_tokens=100, before=wait)
    await cluster.add("d0")
    first = asyncio.create_task(answer(cluster.generate(timeout=20, stop=STOP)))
    await until(lambda: len(prefill.requests) == 1, "the first is being computed")
    refused = await refusal(cluster.generate(timeout=9, stop=STOP))
    assert (refused.reason, "takes 10.00 s at least" in refused.message) == ("DEADLINE_EXCEEDED", True)
    gate.set()
    await first
    assert len((await answer(cluster.generate(timeout=9, stop=STOP))).token_ids) == 5


async def test_the_longest_deadline(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, deadline_default_s=5.0, deadline_max_s=7.0)
    prefill = await cluster.add("p0")
    await cluster.add("d0")
    for timeout_s in (None, 2.0, 600.0):
        await answer(cluster.generate(timeout=timeout_s, stop=STOP))
    assert [round(timeout_s) for timeout_s in prefill.timeouts_s] == [5, 2, 7]


async def test_a_prompt_beyond_the_limit(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, prompt_tokens_max=9)
    refused = await refusal(cluster.generate())
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")
    assert refused.message == "the prompt has 10 tokens, this router takes at most 9"


async def test_what_a_caller_may(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url)
    prefill = await cluster.add("p0")
    await cluster.add("d0")
    caller = Caller("team-a", cache_salt="tenant", priority_max=2, requests_max=1)
    frontend = cluster.frontend
    request = GenerateRequest(token_ids=PROMPT, stop=STOP, priority=7, cache_salt="s")
    async with aclosing(frontend.generate(request, "r1", frontend.deadline(None), caller)) as events:
        assert isinstance(await anext(events), Started)
        with pytest.raises(OverloadedError, match="1 requests of key 'team-a' are in flight, 1 is its limit"):
            await anext(frontend.generate(request, "r2", frontend.deadline(None), caller))
        async for _ in events:
            pass
    assert (prefill.requests[0].priority, prefill.requests[0].cache_salt) == (2, "6:tenants")
