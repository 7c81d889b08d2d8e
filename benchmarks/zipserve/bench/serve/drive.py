"""Sends requests when they are due, whatever has become of those before them."""

import asyncio
import time
from collections.abc import Sequence

from zipserve.bench.serve.arrivals import Arrival
from zipserve.bench.serve.endpoints import Ask, Prompt
from zipserve.bench.serve.records import Record

_SPIN_S = 0.001
"""The event loop's timers are late by up to this; the rest is waited for in turns of the loop."""


async def drive(ask: Ask, arrivals: Sequence[Arrival], prompts: Sequence[Prompt]) -> list[Record]:
    """Runs an open loop: arrivals are never held back by slow answers, and what the loop itself is late by is noted.

    Returns:
        Records in order of arrival.
    """
    start_s = time.perf_counter()
    records = [Record(start_s + arrival.at_s, arrival.prompt_tokens) for arrival in arrivals]
    async with asyncio.TaskGroup() as running:
        for arrival, prompt, record in zip(arrivals, prompts, records, strict=True):
            await _until(record.due_s)
            running.create_task(ask(prompt, arrival.output_tokens, record))
    return records


async def warm_up(ask: Ask, arrivals: Sequence[Arrival], prompts: Sequence[Prompt]) -> list[Record]:
    """Sends requests one after the other."""
    records = [Record(0.0, arrival.prompt_tokens) for arrival in arrivals]
    for arrival, prompt, record in zip(arrivals, prompts, records, strict=True):
        await ask(prompt, arrival.output_tokens, record)
    return records


async def _until(due_s: float) -> None:
    while (left_s := due_s - time.perf_counter()) > 0:  # noqa: ASYNC110  it is a time that is waited for, no event
        await asyncio.sleep(left_s - _SPIN_S if left_s > _SPIN_S else 0)
