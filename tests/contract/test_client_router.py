"""The client against a real router: the README's example as it stands, and what only a real router can show."""

import asyncio
import re
import sys
import textwrap
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from polling import until
from router_cluster import Cluster, build
from router_peers import text_at
from zipserve.client import AsyncClient, Delta, Message, Started
from zipserve.common.errors import InvalidRequestError, ModelNotFoundError, NoWorkerError
from zipserve.common.models import ModelFiles

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
async def cluster(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Cluster:
    return await build(stack, model, redis_url)


async def test_the_readme(cluster: Cluster) -> None:
    await cluster.add("p0")
    await cluster.add("d0")
    (example,) = re.findall(r"\n\n(    from zipserve\.client import .*?)\n\n\S", README.read_text(), re.DOTALL)
    code = textwrap.dedent(example).replace("127.0.0.1:50051", cluster.address)
    command = (sys.executable, "-P", "-c", code)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    shown, _ = await process.communicate()
    chat_tokens = len("Write a haiku.") + len("user:") + len("assistant:") + 3
    text_tokens = len("Once upon a time")
    assert shown.decode() == text_at(chat_tokens, 64) + "\n" + text_at(text_tokens, 64)


async def test_every_call(cluster: Cluster) -> None:
    await cluster.add("p0")
    await cluster.add("d0")
    async with AsyncClient(cluster.address) as client:
        events = [event async for event in client.generate("!" * 10, max_tokens=3, request_id="mine")]
        assert isinstance(events[0], Started)
        assert events[0].request_id == "mine"
        assert "".join(event.text for event in events if isinstance(event, Delta)) == text_at(10, 3)
        answer = await client.complete([3] * 10, max_tokens=3, n=2)
        assert [choice.text for choice in answer.choices] == [text_at(10, 3)] * 2
        assert await client.detokenize(await client.tokenize("hé")) == "hé"
        assert len(await client.tokenize([Message("user", "x")])) == 19
        assert [model.id for model in await client.models()] == ["tiny"]
        assert (await client.model()).context_tokens == 512
        with pytest.raises(ModelNotFoundError):
            await client.model("gpt-9")
        with pytest.raises(InvalidRequestError) as caught:
            await client.complete("x", n=17)
        assert caught.value.field == "n"


async def test_without_workers(cluster: Cluster) -> None:
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(NoWorkerError):
            await client.complete("x")


async def test_a_closed_stream_ends_every_hop(cluster: Cluster) -> None:
    async def never_after(position: object) -> None:
        if position == 14:
            await asyncio.Event().wait()

    await cluster.add("p0")
    decode = await cluster.add("d0", at_token=never_after)
    async with AsyncClient(cluster.address) as client:
        async with client.generate([3] * 10, max_tokens=400) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    break
            await until(lambda: len(decode.requests) == 1, "decode was asked")
        async with asyncio.timeout(5):
            await decode.cancelled.wait()
    await cluster.at_rest()
