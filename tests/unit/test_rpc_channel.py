"""Deadlines, durations, and the channel pool."""

import asyncio
import time
from typing import Any, cast

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import DeadlineError
from zipserve.common.rpc import Context
from zipserve.common.rpc.channel import ChannelPool, Deadline
from zipserve.common.rpc.duration import to_duration, to_seconds


class Clock:
    """time.monotonic, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class FakeContext:
    """A call's context that knows its time only."""

    def __init__(self, remaining_s: float | None) -> None:
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s


def deadline_of(remaining_s: float | None, default_s: float) -> Deadline:
    return Deadline.of(cast("Context", FakeContext(remaining_s)), default_s)


def test_deadline_counts_down(clock: Clock) -> None:
    deadline = Deadline(5.0)
    assert deadline.remaining_s() == 5.0
    clock.now_s += 2.0
    assert deadline.remaining_s() == 3.0
    assert deadline.remaining_s(at_most_s=1.0) == 1.0
    assert deadline.remaining_s(at_most_s=10.0) == 3.0
    clock.now_s += 2.999
    assert deadline.remaining_s() == pytest.approx(0.001)
    clock.now_s = deadline.at_s
    for _ in range(2):
        with pytest.raises(DeadlineError, match="has passed"):
            deadline.remaining_s()
        clock.now_s += 1.0


@pytest.mark.parametrize(("remaining_s", "expected_s"), [(None, 600.0), (2.0, 2.0), (10_000.0, 600.0), (9.2e9, 600.0)])
def test_deadline_of_a_call(clock: Clock, remaining_s: float | None, expected_s: float) -> None:
    assert deadline_of(remaining_s, 600.0).remaining_s() == pytest.approx(expected_s)


@pytest.mark.parametrize("remaining_s", [0.0, -1.0])
def test_deadline_that_passed_on_the_way(clock: Clock, remaining_s: float) -> None:
    with pytest.raises(DeadlineError):
        deadline_of(remaining_s, 600.0).remaining_s()


@given(st.floats(0, 1e9))
def test_duration_round_trip(seconds: float) -> None:
    assert to_seconds(to_duration(seconds)) == pytest.approx(seconds, abs=1e-9, rel=1e-12)


def test_unset_duration() -> None:
    assert to_seconds(Duration()) == 0.0


async def test_one_channel_per_address() -> None:
    async with ChannelPool(1 << 20) as channels:
        assert channels.get("127.0.0.1:1") is channels.get("127.0.0.1:1")
        assert channels.get("127.0.0.1:1") is not channels.get("127.0.0.1:2")


async def test_a_server_that_is_slow_to_greet_is_waited_for() -> None:
    """As a loaded machine or a long way makes it: an attempt to connect must have more than a moment."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pumps: list[asyncio.Task[None]] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)  # the slowness itself
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        pumps.append(asyncio.create_task(_pump(upstream_reader, writer)))
        await _pump(reader, upstream_writer)

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
    async with ChannelPool(1 << 20) as channels:
        channel: Any = channels.get("127.0.0.1:" + str(proxy.sockets[0].getsockname()[1]))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/a/b")(b"", timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED, "it did not get as far as the server"
    proxy.close()
    await server.stop(0)
    await asyncio.gather(*pumps)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_a_closed_pool_fails_its_calls_and_can_be_closed_again() -> None:
    channels = ChannelPool(1 << 20)
    channel: Any = channels.get("127.0.0.1:1")
    await channels.close()
    await channels.close()
    with pytest.raises((grpc.aio.UsageError, grpc.aio.AioRpcError)):
        await channel.unary_unary("/a/b")(b"", timeout=1)
