"""Blocks of others that come late, or never: who waits for them, who does not, and what they hold up."""

import asyncio
from typing import Any

import pytest

from memory_transport import Fabric
from polling import until
from shared_blocks import Reads, fetches, give_up, knows, names_of, two
from workers import BLOCK, Decode, Prefill, Workers, prompt
from zipserve.common.errors import OverloadedError
from zipserve.common.kv.layout import SlabKind
from zipserve.decode.scheduler import Place
from zipserve.v1.prefill_service_pb2 import PrefillResponse
from zipserve.v1.sampling_pb2 import SamplingParams

TOKENS = 5 * BLOCK + 7


async def lacking(cluster_workers: Workers, **settings: Any) -> tuple[Prefill, list[int], Reads]:
    """A prefill worker, a prompt of which another one has all five blocks, and the reads of them, which are held up."""
    fabric = Fabric()
    first, second = await two(cluster_workers, fabric, fetch_s=20.0, **settings)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    return second, token_ids, Reads(fabric)


async def test_a_worker_that_goes_away_computes_what_it_still_fetches_for(cluster_workers: Workers) -> None:
    second, token_ids, reads = await lacking(cluster_workers)
    late = asyncio.create_task(second.compute(token_ids))
    await reads.begun()
    second.service.begin_drain()
    drained = asyncio.create_task(second.service.drained())
    reads.go()
    answer = await late
    assert not drained.done(), "its handle has not been pulled yet"
    give_up(second, answer)
    await drained


async def test_who_fetches_counts_as_queued(cluster_workers: Workers) -> None:
    second, token_ids, reads = await lacking(cluster_workers, queue_requests_max=2)
    here = [asyncio.create_task(second.compute([*token_ids, i])) for i in range(2)]
    await reads.begun()
    await until(lambda: second.service.load().queued_requests == 2, "both wait for the blocks")
    with pytest.raises(OverloadedError, match="2 requests wait, the limit is 2"):
        await second.compute(token_ids, timeout_s=5.0)
    reads.go()
    give_up(second, *await asyncio.gather(*here))


async def test_a_deadline_leaves_time_to_compute_what_does_not_come(cluster_workers: Workers) -> None:
    second, token_ids, reads = await lacking(cluster_workers)
    answer = await second.compute(token_ids, timeout_s=3.0)
    assert answer.cached_tokens == 0
    give_up(second, answer)
    reads.go()
    await until(lambda: fetches(second) != {}, "the fetch has ended")


async def test_slabs_of_a_fetch_that_nobody_waits_for_go_to_who_needs_them(cluster_workers: Workers) -> None:
    second, token_ids, reads = await lacking(cluster_workers)
    impatient = asyncio.create_task(second.compute(token_ids))
    await reads.begun()
    impatient.cancel()
    large = asyncio.create_task(second.compute(prompt(20 * BLOCK, salt=3), timeout_s=5.0))
    await until(lambda: second.service.load().queued_requests == 1, "it waits for slabs")
    reads.go()
    give_up(second, await large)


async def test_what_was_computed_while_it_was_fetched_stays_in_order(cluster_workers: Workers) -> None:
    second, token_ids, reads = await lacking(cluster_workers)
    impatient = asyncio.create_task(second.compute(token_ids))
    await reads.begun()
    impatient.cancel()
    asks_all = SamplingParams(temperature=0, seed=1, prompt_logprobs=0)  # so it fetches nothing
    give_up(second, await second.compute(token_ids[: BLOCK + 1], sampling=asks_all))
    reads.go()
    await until(lambda: fetches(second) != {}, "the fetch has ended")
    run = second.service.scheduler.index.find(names_of(second, token_ids))
    assert [block.parent for block in run] == [None, *run[:-1]], "each stands behind the one before it"
    assert len(run) == 5


async def test_a_sequence_that_grows_gets_the_slabs_of_a_fetch_that_has_ended(cluster_workers: Workers) -> None:
    fabric = Fabric()
    prefill = await cluster_workers.prefill(fabric.open)
    decode = await cluster_workers.decode(fabric.open, kv_blocks=8, fetch_s=20.0)
    token_ids = prompt(TOKENS)
    give_up(prefill, await prefill.compute(token_ids))
    await knows(decode, prefill, token_ids, 5)
    other = await prefill.compute(prompt(BLOCK, salt=3))
    reads = Reads(fabric)

    async def computed() -> None:
        request = decode.request(PrefillResponse(), 4, prompt_token_ids=token_ids)
        request.ClearField("handle")
        async for _ in decode.stub.Decode(request, timeout=20.0):
            pass

    fetching = asyncio.create_task(computed())
    await reads.begun()
    fabric.faults.before = _at_once
    growing = asyncio.create_task(decode.events(other, 6 * BLOCK, timeout_s=6.0))
    fetching.cancel()
    await until(lambda: decode.service.worker._requests == 1, "only one goes on")
    await until(lambda: _is_stuck(decode), "it needs a block that there is not")
    reads.go()
    await growing


async def _at_once() -> None:
    """A read that is not held up."""


def _is_stuck(decode: Decode) -> bool:
    """Whether what runs lacks slabs, and nothing happens any more."""
    scheduler, worker = decode.service.scheduler, decode.service.worker
    running = scheduler._tickets[Place.RUNNING]
    lack = any(scheduler.pools.missing(ticket.slabs, ticket.tokens)[SlabKind.BLOCK] for ticket in running)
    return lack and not worker._in_use and not worker._work.is_set()
