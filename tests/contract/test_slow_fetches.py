"""Blocks of others that come late, or never: who waits for them, who does not, and what they hold up."""

import asyncio

import pytest

from memory_transport import Fabric
from polling import until
from shared_blocks import Reads, give_up, knows, two
from workers import BLOCK, Workers, prompt
from zipserve.common.errors import OverloadedError

TOKENS = 5 * BLOCK + 7


async def test_a_worker_that_goes_away_computes_what_it_still_fetches_for(cluster_workers: Workers) -> None:
    fabric = Fabric()
    first, second = await two(cluster_workers, fabric, fetch_s=20.0)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    reads = Reads(fabric)
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
    fabric = Fabric()
    first, second = await two(cluster_workers, fabric, fetch_s=20.0, queue_requests_max=2)
    token_ids = prompt(TOKENS)
    give_up(first, await first.compute(token_ids))
    await knows(second, first, token_ids, 5)
    reads = Reads(fabric)
    here = [asyncio.create_task(second.compute([*token_ids, i])) for i in range(2)]
    await reads.begun()
    await until(lambda: second.service.load().queued_requests == 2, "both wait for the blocks")
    with pytest.raises(OverloadedError, match="2 requests wait, the limit is 2"):
        await second.compute(token_ids, timeout_s=5.0)
    reads.go()
    give_up(second, *await asyncio.gather(*here))
