"""Several streams as one, each item as soon as it comes."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from zipserve.common.errors import WorkerLostError

T = TypeVar("T")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields the items of all streams until all have ended. The first error of one ends the others and is raised;
    closing this closes them all.
    """
    # Of one item, so that who reads slowly holds all of them back.
    arrived: asyncio.Queue[list[T] | Exception | None] = asyncio.Queue(1)

    tasks = [asyncio.create_task(_pump(stream, arrived), name="merge") for stream in streams]
    try:
        running = len(tasks)
        while running:
            match await arrived.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case items:
                    for item in items:
                        yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T, None], arrived: "asyncio.Queue[list[T] | Exception | None]") -> None:
    try:
        async with aclosing(stream) as items:
            async for item in items:
                await arrived.put([item])
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # not ours: a channel that is closed cancels the calls over it
        await arrived.put(WorkerLostError(f"a stream was cancelled from its other end: {error!r}"))
    except Exception as error:  # noqa: BLE001  it is raised where the items are read
        await arrived.put(error)
    else:
        await arrived.put(None)
