"""Tokens of a stream that come faster than a busy router can pass them on one by one, joined into fewer messages.

All that is behind costs the same for a message of one token and of many. While the process has computing time left, a
token passes as it comes; the less it has left, the longer a stream pauses after each message, and what comes meanwhile
makes one message: fewer messages, as many tokens, and a few hundredths of a second between them.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable

from zipserve.v1.decode_service_pb2 import DecodeResponse

TOKENS_MAX = 64
"""Most tokens that wait: then they go on at once, and who does not take them holds the stream back."""
PAUSE_MAX_S = 0.05
_IDLE_SHARE, _BUSY_SHARE = 0.75, 0.95
"""Of a core that this process takes: with less there is no pause, with more the longest."""
_LOOK_S = 0.1
"""Time over which that share is taken."""


class Pace:
    """How long streams pause, by how busy this process is."""

    def __init__(
        self, now: Callable[[], float] = time.monotonic, computed: Callable[[], float] = time.process_time
    ) -> None:
        """
        Args:
            now: the time, in seconds.
            computed: seconds that the process has computed so far.
        """
        self._now = now
        self._computed = computed
        self._looked_s, self._computed_s = now(), computed()
        self._pause_s = 0.0

    def pause_s(self) -> float:
        """Between two messages of a stream, at this time."""
        now_s = self._now()
        if now_s - self._looked_s >= _LOOK_S:
            computed_s = self._computed()
            share = (computed_s - self._computed_s) / (now_s - self._looked_s)
            self._looked_s, self._computed_s = now_s, computed_s
            self._pause_s = PAUSE_MAX_S * min(max((share - _IDLE_SHARE) / (_BUSY_SHARE - _IDLE_SHARE), 0.0), 1.0)
        return self._pause_s


class _Waiting:
    """What has come and has not been taken."""

    def __init__(self) -> None:
        self.events: deque[DecodeResponse] = deque()
        self.tokens = 0
        self.some = asyncio.Event()
        """There is an event, or will be none."""
        self.urgent = asyncio.Event()
        """There is more than tokens, or many of these, or nothing will follow."""
        self.room = asyncio.Event()
        """Events were taken."""

    def put(self, event: DecodeResponse) -> None:
        """Adds an event, to the last one if that has the tokens right before it."""
        self.tokens += len(event.tokens.token_ids)
        if self.events and _follows(event, self.events[-1]):
            last = self.events[-1].tokens
            last.token_ids.extend(event.tokens.token_ids)
            last.logprobs.extend(event.tokens.logprobs)
            last.complete = event.tokens.complete
        else:
            self.events.append(event)
            self.some.set()
        if self.tokens >= TOKENS_MAX or not event.HasField("tokens") or event.tokens.complete:
            self.urgent.set()

    def end(self) -> None:
        """Nothing follows."""
        self.some.set()
        self.urgent.set()

    def take(self) -> list[DecodeResponse]:
        """Removes all events."""
        events = [*self.events]
        self.events.clear()
        self.tokens = 0
        self.room.set()
        return events


def _follows(event: DecodeResponse, last: DecodeResponse) -> bool:
    return (
        event.HasField("tokens")
        and last.HasField("tokens")
        and last.tokens.sequence == event.tokens.sequence
        and last.tokens.position + len(last.tokens.token_ids) == event.tokens.position
    )


async def gathered(
    events: AsyncIterable[DecodeResponse], pause_s: Callable[[], float]
) -> AsyncGenerator[DecodeResponse, None]:
    """The events of a stream in order, tokens of a sequence that wait together joined. An error comes after what came
    before it.

    Args:
        pause_s: how long to wait after events were taken, unless something urgent comes.
    """
    waiting = _Waiting()

    async def read() -> None:
        try:
            async for event in events:
                waiting.put(event)
                while waiting.tokens >= TOKENS_MAX:
                    waiting.room.clear()
                    await waiting.room.wait()
        finally:
            waiting.end()

    reading = asyncio.create_task(read(), name="gather")
    try:
        while True:
            await waiting.some.wait()
            taken = waiting.take()
            if not taken:
                break
            if not reading.done():
                waiting.some.clear()
                waiting.urgent.clear()
            for event in taken:
                yield event
            if (seconds := pause_s()) > 0:
                await _pause(waiting.urgent, seconds)
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _pause(urgent: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await urgent.wait()
    except TimeoutError:
        pass
