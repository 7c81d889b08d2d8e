"""Many streams at once, cancelled ones and late ones: everything finishes, and every slab comes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from oracle import Oracle
from polling import until
from processes import Processes
from streams import Stub, collect, request
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.worker_service_pb2 import WorkerRole

pytestmark = pytest.mark.asyncio(loop_scope="module")

STREAMS = 32
LENGTHS = (1, 5, 127, 128, 129, 300, 700, 1500)


def prompt(index: int) -> list[int]:
    """A prompt of its own for every index; lengths are mixed."""
    length = LENGTHS[index % len(LENGTHS)]
    return [3 + (index * 31 + i * (7 + index % 5)) % 250 for i in range(length)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(redis_url: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Processes]:
    logs = tmp_path_factory.mktemp("streams")
    async with Processes(redis_url, tiny_model, logs, cluster="streams") as processes:
        await processes.start("kvstore-0", "prefill-0", "decode-0", "router")
        yield processes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(stack: Processes) -> AsyncIterator[Stub]:
    async with ChannelPool(4 << 20) as channels:
        yield InferenceServiceStub(channels.get(stack.router))


async def pools_are_full(stack: Processes, within_s: float = 15) -> None:
    """Every worker is idle and holds no slab and no lease."""

    def full() -> bool:
        loads = [
            record.load
            for role in (WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE)
            for record in stack.workers(role)
        ]
        return len(loads) == 2 and all(
            load.free_blocks == load.total_blocks > 0
            and load.free_tails == load.total_tails > 0
            and not (load.leases or load.running_requests or load.queued_requests)
            for load in loads
        )

    await until(full, "all pools are back at their starting level", timeout_s=within_s)


async def test_concurrent_streams_finish_with_the_right_tokens(stack: Processes, stub: Stub, tiny_model: Path) -> None:
    await pools_are_full(stack)
    answers = await asyncio.gather(*(collect(stub, request(prompt(i), 150)) for i in range(STREAMS)))
    oracle = Oracle(tiny_model)
    for i, answer in enumerate(answers):
        assert len(answer.token_ids) == 150
        assert oracle.first_wrong(prompt(i), answer.token_ids) is None
    await pools_are_full(stack)


async def test_cancelling_half_of_the_streams_frees_everything(stack: Processes, stub: Stub, tiny_model: Path) -> None:
    async def half_way(index: int) -> list[int]:
        call = stub.Generate(request(prompt(index), 400), timeout=60)
        seen: list[int] = []
        async for response in call:
            seen += response.delta.token_ids
            if len(seen) > index:  # each at another point; the first ones right after their first token
                break
        call.cancel()
        return seen

    cancelled = asyncio.gather(*(half_way(i) for i in range(1, STREAMS, 2)))
    kept = range(0, STREAMS, 2)
    answers = await asyncio.gather(*(collect(stub, request(prompt(i), 200)) for i in kept))
    assert all(await cancelled)
    oracle = Oracle(tiny_model)
    for i, answer in zip(kept, answers, strict=True):
        assert oracle.first_wrong(prompt(i), answer.token_ids) is None
    await pools_are_full(stack)


async def test_cancelling_at_once_frees_everything(stack: Processes, stub: Stub) -> None:
    async def give_up(index: int) -> None:
        call = stub.Generate(request(prompt(index), 400), timeout=60)
        with suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(0.002 * index):
                await call.read()
        call.cancel()

    await asyncio.gather(*(give_up(i) for i in range(STREAMS)))
    await pools_are_full(stack)


async def test_a_dropped_stream_frees_everything_at_once(stack: Processes, stub: Stub) -> None:
    await pools_are_full(stack)
    call = stub.Generate(request(prompt(6), 2_000), timeout=60)
    async for response in call:
        if response.delta.index > 3:
            break
    call.cancel()
    # heartbeats tell of it a little later than it is
    await pools_are_full(stack, within_s=1.5)


async def test_passed_deadlines_free_everything(stack: Processes, stub: Stub) -> None:
    async def late(index: int) -> grpc.StatusCode:
        try:
            await collect(stub, request(prompt(index), 2000), timeout_s=0.05 + 0.05 * index)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    codes = await asyncio.gather(*(late(i) for i in range(STREAMS)))
    assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
    await pools_are_full(stack)
