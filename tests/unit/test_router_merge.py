"""Streams joined into one: nothing is lost, each keeps its order, and all end together."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import WorkerLostError
from zipserve.router.merge import merge

Item = tuple[int, int]


class Streams:
    """Some that count, each from 0; `fails` raises at its end, `closed` are those that have been closed."""

    def __init__(self, sizes: list[int], fails: int = -1) -> None:
        self._sizes = sizes
        self._fails = fails
        self.closed: list[int] = []

    async def stream(self, number: int) -> AsyncGenerator[Item, None]:
        try:
            for i in range(self._sizes[number]):
                for _ in range(number):
                    await asyncio.sleep(0)
                yield number, i
            if number == self._fails:
                raise ValueError("a fault of a test")
        finally:
            self.closed.append(number)

    def all(self) -> list[AsyncGenerator[Item, None]]:
        return [self.stream(number) for number in range(len(self._sizes))]


@given(st.lists(st.integers(0, 6), max_size=5))
def test_everything_arrives_in_order(sizes: list[int]) -> None:
    async def run() -> list[Item]:
        return [item async for item in merge(Streams(sizes).all())]

    found = asyncio.run(run())
    for number, size in enumerate(sizes):
        assert [i for of, i in found if of == number] == list(range(size))
    assert len(found) == sum(sizes)


@pytest.mark.parametrize("size", [0, 3])
async def test_an_error_ends_all(size: int) -> None:
    streams = Streams([1000, size, 1000], fails=1)
    with pytest.raises(ValueError, match="a fault of a test"):
        async for _ in merge(streams.all()):
            pass
    assert sorted(streams.closed) == [0, 1, 2]


async def test_closing_closes_all() -> None:
    streams = Streams([1000, 1000])
    async with aclosing(merge(streams.all())) as items:
        async for item in items:
            if item[1] == 5:
                break
    assert sorted(streams.closed) == [0, 1]


async def test_a_slow_reader_holds_the_streams_back() -> None:
    made = 0

    async def stream() -> AsyncGenerator[int, None]:
        nonlocal made
        for i in range(1000):
            made += 1
            yield i

    async with aclosing(merge([stream(), stream()])) as items:
        await anext(items)
        for _ in range(50):
            await asyncio.sleep(0)
        assert made <= 6


async def test_a_stream_that_is_cancelled_from_its_other_end_is_lost() -> None:
    async def cut() -> AsyncGenerator[Item, None]:
        yield 0, 0
        raise asyncio.CancelledError

    with pytest.raises(WorkerLostError):
        async with asyncio.timeout(5):
            assert [item async for item in merge([cut()])]
