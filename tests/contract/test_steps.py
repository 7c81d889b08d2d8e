"""WorkerService.ListSteps: what real workers tell of their forward passes."""

import time

import pytest

from memory_transport import Fabric
from polling import until
from workers import BLOCK, GREEDY, Decode, Prefill, Workers, prompt
from zipserve.common import errors
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.rpc.status import client_errors
from zipserve.common.steps import pairs_of
from zipserve.v1.decode_service_pb2 import DecodeRequest
from zipserve.v1.prefill_service_pb2 import ReleaseHandleRequest
from zipserve.v1.worker_service_pb2 import GetCapabilitiesRequest, ListStepsRequest, ListStepsResponse
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

STEP = 32


async def generate(decode: Decode, token_ids: list[int], tokens: int) -> None:
    """Has a decode worker compute a prompt and some tokens after it."""
    request = DecodeRequest(request_id="r", prompt_token_ids=token_ids, sampling=GREEDY, max_new_tokens=tokens)
    with client_errors():
        async for _ in decode.stub.Decode(request, timeout=20.0):
            pass


async def told(worker: Prefill | Decode, after: int = 0, steps_max: int = 0) -> ListStepsResponse:
    stub = WorkerServiceStub(worker.channels.get(worker.address))
    with client_errors():
        return await stub.ListSteps(ListStepsRequest(after=after, max=steps_max), timeout=10.0)


async def noted(worker: Prefill | Decode, steps: int) -> ListStepsResponse:
    """What it tells once it has noted so many: a step is noted after its tokens were handed out."""
    await until(lambda: worker.service.metrics.steps.last >= steps, f"{steps} steps are noted")
    answer = await told(worker)
    assert answer.next == len(answer.steps) == steps
    assert answer.lost == 0
    return answer


async def test_a_prefill_worker_tells_the_chunks_of_its_steps(cluster_workers: Workers) -> None:
    worker = await cluster_workers.prefill(Fabric().open, step_tokens=STEP)
    begin_s = time.monotonic()
    tokens = 2 * STEP + 5
    prefilled = await worker.compute(tokens)
    took_s = time.monotonic() - begin_s
    answer = await noted(worker, 3)
    assert [step.prompt_tokens for step in answer.steps] == [STEP, STEP, 5]
    assert [step.pairs for step in answer.steps] == [pairs_of(i * STEP, n) for i, n in enumerate((STEP, STEP, 5))]
    assert [(step.rows, step.context_tokens) for step in answer.steps] == [(0, 0)] * 3
    seconds = [to_seconds(step.duration) for step in answer.steps]
    assert min(seconds) > 0
    assert sum(seconds) < took_s + 1.0
    await worker.stub.ReleaseHandle(ReleaseHandleRequest(handle=prefilled.handle), timeout=5.0)


async def test_a_turn_that_waited_for_work_is_not_longer(cluster_workers: Workers) -> None:
    worker = await cluster_workers.decode(Fabric().open, step_tokens=STEP)
    await generate(worker, prompt(8), tokens=2)
    begin_s = time.monotonic()
    await until(lambda: time.monotonic() - begin_s > 0.3, "it has waited")
    await generate(worker, prompt(8, salt=1), tokens=2)
    answer = await noted(worker, 4)
    assert sum(to_seconds(step.duration) for step in answer.steps[2:]) < 0.3


async def test_a_decode_worker_tells_rows_and_chunks(cluster_workers: Workers) -> None:
    worker = await cluster_workers.decode(Fabric().open, step_tokens=STEP)
    await generate(worker, prompt(STEP + 3), tokens=4)
    answer = await noted(worker, 5)
    facts = [(step.prompt_tokens, step.pairs, step.rows, step.context_tokens) for step in answer.steps]
    chunks = [(STEP, pairs_of(0, STEP), 0, 0), (3, pairs_of(STEP, 3), 0, 0)]
    assert facts == [*chunks, *((0, 0, 1, STEP + 3 + i) for i in (1, 2, 3))]


async def test_steps_are_told_in_pages(cluster_workers: Workers) -> None:
    worker = await cluster_workers.decode(Fabric().open, step_tokens=STEP)
    await generate(worker, prompt(BLOCK), tokens=7)
    answer = await noted(worker, 7)
    first = await told(worker, steps_max=3)
    second = await told(worker, first.next)
    assert (first.next, second.next) == (3, 7)
    assert [*first.steps, *second.steps] == list(answer.steps)
    none = await told(worker, 7)
    assert (none.next, len(none.steps), none.lost) == (7, 0, 0)
    assert answer.incarnation == worker.service.device.incarnation


async def test_a_number_of_another_life_is_refused(cluster_workers: Workers) -> None:
    worker = await cluster_workers.decode(Fabric().open, step_tokens=STEP)
    with pytest.raises(errors.InvalidRequestError, match="after is 5, the last step is 0"):
        await told(worker, 5)


async def test_only_the_cluster_may_ask(cluster_workers: Workers) -> None:
    worker = await cluster_workers.decode(Fabric().open, step_tokens=STEP)
    async with ChannelPool(1 << 20) as strangers:
        stub = WorkerServiceStub(strangers.get(worker.address))
        with pytest.raises(errors.UnauthenticatedError), client_errors():
            await stub.ListSteps(ListStepsRequest(), timeout=10.0)


async def test_a_worker_tells_what_fixes_the_time_of_its_steps(cluster_workers: Workers) -> None:
    worker = await cluster_workers.prefill(Fabric().open, step_tokens=STEP, threads=1)
    stub = WorkerServiceStub(worker.channels.get(worker.address))
    facts = (await stub.GetCapabilities(GetCapabilitiesRequest(), timeout=10.0)).capabilities
    assert (facts.device, facts.threads, facts.weights) == ("cpu", 1, "checkpoint")
    assert (facts.step_tokens, facts.sequences_max) == (STEP, worker.settings.sequences_max)
    module = worker.service.device._model.module
    assert facts.parameters >= sum(each.numel() for each in module.parameters()) > 0
