"""How every part of zipserve talks to Redis: never for long, and never as if it had to be there."""

import asyncio
from typing import TypeAlias

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from zipserve.common.settings import ServiceSettings

OPERATION_TIMEOUT_S = 2.0
Field: TypeAlias = bytes | bytearray | memoryview | str | int | float
"""What redis-py takes for a field or value of a hash."""


def connect(settings: ServiceSettings) -> redis.Redis:
    """A client that connects when it is used."""
    return redis.Redis.from_url(
        settings.redis_url,
        socket_timeout=OPERATION_TIMEOUT_S,
        socket_connect_timeout=OPERATION_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),  # once, for a connection that Redis has closed; its users' loops do the rest
    )


def deadline() -> asyncio.Timeout:
    """Ends one exchange with Redis that takes too long, by a TimeoutError (which is an OSError)."""
    return asyncio.timeout(OPERATION_TIMEOUT_S)


async def passed(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits for an event; False when the time ran out. Loops that use Redis end by an event and not by cancellation,
    because redis-py waits by asyncio.wait_for, which in Python 3.11 swallows a cancellation that meets its result."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def writer_pause_s(settings: ServiceSettings, failures: int) -> float:
    """Time to the next heartbeat of a writer that has failed so often in a row."""
    # views keep an entry for one time to live after Redis has come back without it: be there before
    longest_s = max(settings.heartbeat_s, settings.registry_ttl_s / 4)
    return min(settings.heartbeat_s * 2.0 ** min(failures, 8), longest_s)
