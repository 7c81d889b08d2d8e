"""Several streams as one, each item as soon as it comes."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yields the items of all streams until all have ended. The first error of one ends the others and is raised;
    closing this closes them all.
    """
    # Of one item, so that who reads slowly holds all of them back.
    arrived: asyncio.Queue[list[T] | Exception | None] = asyncio.Queue(1)

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    await arrived.put([item])
        except Exception as error:  # noqa: BLE001  it is raised where the items are read
            await arrived.put(error)
        else:
            await arrived.put(None)

    tasks = [asyncio.create_task(pump(stream), name="merge") for stream in streams]
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
