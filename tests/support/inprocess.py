"""Runs real services inside the test's event loop, so that a test can reach into their memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from zipserve.common.rpc.server import Service, serve
from zipserve.common.settings import ServiceSettings

SECRET = "a secret for tests only"
START_TIMEOUT_S = 60.0


@asynccontextmanager
async def running(service: Service, settings: ServiceSettings) -> AsyncIterator[str]:
    """Serves until the context ends, which drains it; gives the address."""
    shutdown = asyncio.Event()
    address: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    task: asyncio.Future[Any] = asyncio.create_task(serve(service, settings, shutdown, address.set_result))
    try:
        await asyncio.wait({task, address}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not address.done():
            task.cancel()
            await task
        yield await address
    finally:
        shutdown.set()
        await task
