"""Tokens that a busy router joins: none is lost, moved or held back for long."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from polling import until
from zipserve.common.errors import WorkerLostError
from zipserve.router.gather import PAUSE_MAX_S, TOKENS_MAX, Pace, gathered
from zipserve.v1.decode_service_pb2 import DecodedTokens, DecodeFinished, DecodeResponse, Pulled
from zipserve.v1.sampling_pb2 import TokenLogprobs

PULLED = DecodeResponse(pulled=Pulled(blocks=1))
FINISHED = DecodeResponse(finished=DecodeFinished(sequence=1))


def tokens(position: int, *token_ids: int, sequence: int = 0) -> DecodeResponse:
    logprobs = [TokenLogprobs(logprob=-token_id) for token_id in token_ids]
    return DecodeResponse(
        tokens=DecodedTokens(position=position, token_ids=token_ids, logprobs=logprobs, sequence=sequence)
    )


class Source:
    """A stream that a test feeds; an exception ends it."""

    def __init__(self, *events: DecodeResponse | Exception | None) -> None:
        self._queue: asyncio.Queue[DecodeResponse | Exception | None] = asyncio.Queue()
        self.read = 0
        self.closed = False
        for event in events:
            self.put(event)

    def put(self, event: DecodeResponse | Exception | None) -> None:
        """None: the end."""
        self._queue.put_nowait(event)

    async def __aiter__(self) -> AsyncGenerator[DecodeResponse, None]:
        try:
            while (event := await self._queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                self.read += 1
                yield event
        finally:
            self.closed = True


async def taken(source: Source, pause_s: float) -> list[DecodeResponse]:
    return [event async for event in gathered(source, lambda: pause_s)]


async def test_an_idle_router_passes_every_token_as_it_comes() -> None:
    source = Source()
    events = gathered(source, lambda: 0.0)
    for event in (PULLED, tokens(5, 1), tokens(6, 2), tokens(7, 3), FINISHED):
        source.put(event)
        async with asyncio.timeout(5):
            assert await anext(events) == event
    source.put(None)
    assert [event async for event in events] == []


async def test_a_busy_router_joins_what_comes_in_a_pause() -> None:
    source = Source(tokens(5, 1))
    events = gathered(source, lambda: 3600.0)
    assert await anext(events) == tokens(5, 1)
    joined = asyncio.ensure_future(anext(events))
    for i in range(TOKENS_MAX):
        source.put(tokens(6 + i, i))
    async with asyncio.timeout(5):
        assert await joined == tokens(6, *range(TOKENS_MAX)), "so many do not wait for the end of the pause"
    await events.aclose()


async def test_a_pause_ends() -> None:
    source = Source(tokens(5, 1))
    events = gathered(source, lambda: 0.001)
    async with asyncio.timeout(5):
        assert await anext(events) == tokens(5, 1)
        source.put(tokens(6, 2))
        assert await anext(events) == tokens(6, 2), "though nothing more comes"
    await events.aclose()


@pytest.mark.parametrize("pause_s", [0.0, 3600.0])
async def test_only_neighbours_are_joined_and_all_stays_in_order(pause_s: float) -> None:
    other = tokens(50, 9, sequence=1)
    given: Sequence[DecodeResponse] = (
        PULLED, tokens(5, 1), tokens(6, 2, 3), other, tokens(8, 4), tokens(10, 6), FINISHED, tokens(11, 7),
        tokens(12, 8),
    )  # fmt: skip
    async with asyncio.timeout(5):
        found = await taken(Source(*given, None), pause_s)
    if pause_s:
        assert found == [
            PULLED, tokens(5, 1, 2, 3), other, tokens(8, 4), tokens(10, 6), FINISHED, tokens(11, 7, 8),
        ]  # fmt: skip


async def test_an_error_comes_after_what_came_before_it() -> None:
    events = gathered(Source(tokens(5, 1), tokens(6, 2), WorkerLostError("gone")), lambda: 3600.0)
    async with asyncio.timeout(5):
        assert await anext(events) == tokens(5, 1, 2)
        with pytest.raises(WorkerLostError):
            await anext(events)


async def test_who_does_not_take_holds_the_stream_back() -> None:
    source = Source(*(tokens(i, i) for i in range(3 * TOKENS_MAX)))
    events = gathered(source, lambda: 0.0)
    await anext(events)
    await until(lambda: source.read >= TOKENS_MAX, "the stream is read ahead")
    for _ in range(50):
        await asyncio.sleep(0)
    assert source.read <= 2 * TOKENS_MAX
    await events.aclose()


async def test_closing_ends_the_reading() -> None:
    source = Source(tokens(5, 1))
    events = gathered(source, lambda: 0.0)
    await anext(events)
    await events.aclose()
    await until(lambda: source.closed, "the stream is closed")


def test_the_pause_follows_the_load() -> None:
    now_s = computed_s = 0.0
    pace = Pace(now=lambda: now_s, computed=lambda: computed_s)
    found = []
    for share in (0.0, 0.75, 0.85, 0.95, 4.0, 0.5):
        now_s += 0.125
        computed_s += 0.125 * share
        found.append(pace.pause_s())
        now_s += 0.0625
        computed_s += 100.0
        assert pace.pause_s() == found[-1], "too early for another look"
        computed_s -= 100.0 - 0.0625 * share
        now_s += 0.0625
        computed_s += 0.0625 * share
        pace.pause_s()
    assert found == pytest.approx([0.0, 0.0, PAUSE_MAX_S / 2, PAUSE_MAX_S, PAUSE_MAX_S, 0.0], abs=1e-9)


async def test_what_completes_a_guide_is_told_at_once_and_as_such() -> None:
    source = Source(tokens(5, 1), tokens(6, 2))
    events = gathered(source, lambda: 60.0)
    assert (await anext(events)).tokens.token_ids == [1, 2]
    source.put(tokens(7, 3))
    last = tokens(8, 4)
    last.tokens.complete = True
    source.put(last)
    async with asyncio.timeout(5):
        joined = (await anext(events)).tokens
    assert (list(joined.token_ids), joined.complete) == ([3, 4], True)
    await events.aclose()
