"""The KV transfer service of a prefill worker, and what both transports promise to the pulling side."""

import asyncio
import ctypes
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from memory_transport import Fabric, MemoryTransport
from polling import until
from workers import Prefill, Workers, claims_of, value
from zipserve.common import errors
from zipserve.common.kv.layout import SlabKind
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.rpc.status import client_errors
from zipserve.common.transport import ArenaInfo, Range, Transport, TransportFactory
from zipserve.common.transport import nixl as nixl_module
from zipserve.common.transport.nixl import NixlTransport
from zipserve.v1.kv_transfer_service_pb2 import (
    MEMORY_TYPE_DRAM,
    ConnectRequest,
    ReleaseLeaseRequest,
    RenewLeasesRequest,
)

SLAB_BYTES = 8192
DRAM = ("DRAM", "DRAM")


@pytest.fixture
async def prefill(cluster_workers: Workers) -> Prefill:
    return await cluster_workers.prefill(Fabric().open, lease_ttl_s=5.0)


def connect_request(prefill: Prefill, **changes: Any) -> ConnectRequest:
    device = prefill.service.device
    fields = {
        "worker_id": "decode-0",
        "expected_incarnation": device.incarnation,
        "layout_fingerprint": device.layout.fingerprint,
    }
    return ConnectRequest(**{**fields, **changes})


# The service.


async def test_connect(prefill: Prefill) -> None:
    device = prefill.service.device
    answer = await prefill.transfer.Connect(connect_request(prefill), timeout=5)
    assert answer.incarnation == device.incarnation
    assert answer.agent_metadata == f"prefill-0-{device.incarnation:016x}".encode()
    assert [(SlabKind(a.kind), a.base_address, a.slab_bytes, a.slabs) for a in answer.arenas] == [
        (a.kind, a.base_address, a.slab_bytes, a.slabs) for a in device.arenas
    ]
    assert {a.memory_type for a in answer.arenas} == {MEMORY_TYPE_DRAM}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"expected_incarnation": 0}, errors.IncarnationError),
        ({"layout_fingerprint": b""}, errors.LayoutMismatchError),
        ({"layout_fingerprint": b"x" * 32}, errors.LayoutMismatchError),
    ],
)
async def test_connect_refuses(changes: dict[str, Any], error: type[Exception], prefill: Prefill) -> None:
    with pytest.raises(error) as raised, client_errors():
        await prefill.transfer.Connect(connect_request(prefill, **changes), timeout=5)
    assert type(raised.value) is error


async def test_renew_keeps_a_lease_and_names_the_lost_ones(cluster_workers: Workers) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, lease_ttl_s=0.4)
    lease_id = claims_of((await prefill.compute(40)).handle).lease_id
    other_id = claims_of((await prefill.compute(40)).handle).lease_id
    started_s = time.monotonic()
    while time.monotonic() < started_s + 1.0:
        answer = await prefill.transfer.RenewLeases(
            RenewLeasesRequest(lease_ids=[lease_id, b"never issued"]), timeout=5
        )
        assert list(answer.lost_lease_ids) == [b"never issued"]
        assert to_seconds(answer.lease_ttl) == 0.4
        await asyncio.sleep(0.05)  # a reader's pace
    assert prefill.service.load().leases == 1, "the lease that nobody renewed is gone"
    answer = await prefill.transfer.RenewLeases(RenewLeasesRequest(lease_ids=[other_id, lease_id]), timeout=5)
    assert list(answer.lost_lease_ids) == [other_id]
    assert value(prefill.service.metrics, "zipserve_kv_leases_expired_total") == 1
    await until(lambda: prefill.service.load().leases == 0, "the other one expires as well")
    answer = await prefill.transfer.RenewLeases(RenewLeasesRequest(lease_ids=[lease_id]), timeout=5)
    assert list(answer.lost_lease_ids) == [lease_id], "a dead lease came back"
    assert value(prefill.service.metrics, "zipserve_kv_leases_expired_total") == 2


async def test_renew_of_nothing_and_of_too_many(prefill: Prefill) -> None:
    assert not (await prefill.transfer.RenewLeases(RenewLeasesRequest(), timeout=5)).lost_lease_ids
    many = [i.to_bytes(16, "big") for i in range(4096)]
    answer = await prefill.transfer.RenewLeases(RenewLeasesRequest(lease_ids=many), timeout=5)
    assert list(answer.lost_lease_ids) == many
    with pytest.raises(errors.InvalidRequestError, match="renews 4097 leases, at most 4096") as raised, client_errors():
        await prefill.transfer.RenewLeases(RenewLeasesRequest(lease_ids=[*many, b"x"]), timeout=5)
    assert raised.value.field == "lease_ids"


async def test_release_frees_once(prefill: Prefill) -> None:
    lease_id = claims_of((await prefill.compute(40)).handle).lease_id
    assert (await prefill.load()).leases == 1
    assert (await prefill.load()).free_blocks == 22
    request = ReleaseLeaseRequest(lease_id=lease_id)
    assert (await prefill.transfer.ReleaseLease(request, timeout=5)).was_alive
    await prefill.settled()
    assert not (await prefill.transfer.ReleaseLease(request, timeout=5)).was_alive
    assert not (await prefill.transfer.ReleaseLease(ReleaseLeaseRequest(), timeout=5)).was_alive


async def test_release_after_expiry_is_not_alive_even_before_the_reaper(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slabs are still untouched then; but whether they were, the reader cannot know."""
    monkeypatch.setattr(prefill.service.source._leases, "ttl_s", 0.0)
    lease_id = claims_of((await prefill.compute(40)).handle).lease_id
    assert not (await prefill.transfer.ReleaseLease(ReleaseLeaseRequest(lease_id=lease_id), timeout=5)).was_alive
    await prefill.settled()


async def test_a_renewal_announces_a_read(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    lease_id = claims_of((await prefill.compute(40)).handle).lease_id
    said: list[bool] = []
    monkeypatch.setattr(MemoryTransport, "expect_readers", lambda _, expected: said.append(expected))
    await prefill.transfer.RenewLeases(RenewLeasesRequest(lease_ids=[lease_id]), timeout=5)
    assert said == [True]


async def test_bytes_that_are_no_message(prefill: Prefill) -> None:
    channel: Any = prefill.channels.get(prefill.address)
    for method in ("Connect", "RenewLeases", "ReleaseLease"):
        with pytest.raises(errors.InvalidRequestError, match="not a valid message"), client_errors():
            await channel.unary_unary(f"/zipserve.v1.KvTransferService/{method}")(b"\xff\xff", timeout=5)


async def test_a_message_that_is_too_large(prefill: Prefill) -> None:
    request = RenewLeasesRequest(lease_ids=[b"x" * 10_000_000])
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await prefill.transfer.RenewLeases(request, timeout=5)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await prefill.transfer.Connect(connect_request(prefill), timeout=5)).incarnation


# The transports.


@dataclass
class Agent:
    """A transport over one arena of its own, filled with `fill`."""

    transport: Transport
    arena: ArenaInfo
    memory: "np.ndarray[Any, np.dtype[np.uint8]]"

    def range_from(self, source: "Agent", slab: int) -> Range:
        return Range(source.arena.address(slab), 0, self.arena.address(slab), 0, SLAB_BYTES)


@contextmanager
def agents(open_transport: TransportFactory) -> Iterator[Callable[..., Agent]]:
    """Opens agents over arenas of their own, and closes them in the end."""
    opened: list[Agent] = []

    def open_agent(slabs: int = 8) -> Agent:
        space = np.zeros(slabs * SLAB_BYTES + 4096, np.uint8)
        start = -space.ctypes.data % 4096
        memory = space[start : start + slabs * SLAB_BYTES]
        arena = ArenaInfo(SlabKind.BLOCK, memory.ctypes.data, SLAB_BYTES, slabs, "DRAM")
        transport = open_transport(f"agent-{uuid.uuid4().hex}", [arena])
        opened.append(Agent(transport, arena, memory))
        return opened[-1]

    try:
        yield open_agent
    finally:
        for one in opened:
            one.transport.close()


@pytest.fixture(params=["memory", "shm", "tcp"])
async def agent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Agent]]:
    """Of the fake, or of NIXL over one of UCX's transports, which it chooses when an agent starts."""
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    with agents(Fabric().open if request.param == "memory" else NixlTransport) as open_agent:
        yield open_agent


over_nixl = pytest.mark.parametrize("agent", ["shm", "tcp"], indirect=True)
over_tcp = pytest.mark.parametrize("agent", ["tcp"], indirect=True)
"""Where a read needs the source: over shared memory the reader's side copies by itself, in the call that posts."""


def filled(one: Agent, seed: int = 1) -> Agent:
    one.memory[:] = np.random.default_rng(seed).integers(0, 255, one.memory.size, np.uint8)
    one.transport.expect_readers(True)
    return one


async def test_read(agent: Callable[..., Agent]) -> None:
    source, reader = filled(agent()), agent()
    peer = await reader.transport.connect(source.transport.metadata())
    ranges = [reader.range_from(source, slab) for slab in (0, 3, 7)]
    await reader.transport.read(peer, ranges, DRAM, 5.0)
    expected = np.zeros_like(reader.memory).reshape(8, -1)
    expected[[0, 3, 7]] = source.memory.reshape(8, -1)[[0, 3, 7]]
    assert (reader.memory.reshape(8, -1) == expected).all(), "other slabs were written, or these not"


async def test_reads_at_the_same_time(agent: Callable[..., Agent]) -> None:
    sources, reader = [filled(agent(), seed) for seed in (1, 2)], agent(16)
    peers = [await reader.transport.connect(source.transport.metadata()) for source in sources]
    await asyncio.gather(
        *(
            reader.transport.read(
                peers[i],
                [Range(sources[i].arena.address(s), 0, reader.arena.address(8 * i + s), 0, SLAB_BYTES)],
                DRAM,
                5.0,
            )
            for i in range(2)
            for s in range(8)
        )
    )
    assert (reader.memory == np.concatenate([sources[0].memory, sources[1].memory])).all()


@pytest.mark.parametrize("metadata", [b"", b"rubbish", b"nixlSerDes|" + bytes(100)])
async def test_connect_to_rubbish(agent: Callable[..., Agent], metadata: bytes) -> None:
    source, reader = filled(agent()), agent()
    with pytest.raises(errors.TransferError):
        await reader.transport.connect(metadata)
    peer = await reader.transport.connect(source.transport.metadata())
    await reader.transport.read(peer, [reader.range_from(source, 0)], DRAM, 5.0)


async def test_connecting_again(agent: Callable[..., Agent]) -> None:
    source, reader = filled(agent()), agent()
    for _ in range(3):
        again = await reader.transport.connect(source.transport.metadata())
        await reader.transport.read(again, [reader.range_from(source, 0)], DRAM, 5.0)
    peer = await reader.transport.connect(source.transport.metadata())
    await reader.transport.disconnect(peer)
    await reader.transport.disconnect(peer)
    with pytest.raises(errors.TransferError):
        await reader.transport.read(peer, [reader.range_from(source, 1)], DRAM, 5.0)
    peer = await reader.transport.connect(source.transport.metadata())
    await reader.transport.read(peer, [reader.range_from(source, 1)], DRAM, 5.0)
    assert (reader.memory[: 2 * SLAB_BYTES] == source.memory[: 2 * SLAB_BYTES]).all()


async def test_a_peer_that_has_closed(agent: Callable[..., Agent]) -> None:
    source, reader = filled(agent()), agent()
    peer = await reader.transport.connect(source.transport.metadata())
    source.transport.close()
    started_s = time.monotonic()
    with pytest.raises(errors.TransferError):
        await reader.transport.read(peer, [reader.range_from(source, 0)], DRAM, 30.0)
    assert time.monotonic() - started_s < 5.0


async def test_another_life_of_a_peer(agent: Callable[..., Agent]) -> None:
    first, reader = filled(agent()), agent()
    await reader.transport.connect(first.transport.metadata())
    first.transport.close()
    second = filled(agent(), seed=2)
    peer = await reader.transport.connect(second.transport.metadata())
    await reader.transport.read(peer, [reader.range_from(second, 0)], DRAM, 5.0)
    assert (reader.memory[:SLAB_BYTES] == second.memory[:SLAB_BYTES]).all()


# Real NIXL alone, with a thread that does not move because it is held.


@contextmanager
def held(one: Agent) -> Iterator[None]:
    """An agent does nothing inside the context."""
    transport: Any = one.transport
    is_held, let_go = threading.Event(), threading.Event()
    transport._inbox.put(is_held.set)
    transport._inbox.put(lambda: let_go.wait(20.0))
    assert is_held.wait(5.0)
    try:
        yield
    finally:
        let_go.set()


async def nothing_arrives_late(source: Agent, reader: Agent) -> None:
    """The source moves again, as a further read proves; the slabs of the one that has ended belong to others now."""
    assert not reader.memory.any()
    peer = await reader.transport.connect(source.transport.metadata())
    await reader.transport.read(peer, [reader.range_from(source, 7)], DRAM, 5.0)
    assert (reader.memory[7 * SLAB_BYTES :] == source.memory[7 * SLAB_BYTES :]).all()
    assert not reader.memory[: 7 * SLAB_BYTES].any(), "a read that had ended wrote"


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_module, "_GRACE_S", 0.1)


@over_tcp
@pytest.mark.usefixtures("short_grace")
async def test_a_deadline_ends_a_read(agent: Callable[..., Agent]) -> None:
    source, reader = filled(agent()), agent()
    peer = await reader.transport.connect(source.transport.metadata())
    with held(source):
        ranges = [reader.range_from(source, slab) for slab in (0, 1)]
        started_s = time.monotonic()
        with pytest.raises(errors.DeadlineError, match="2 slabs in time"):
            await reader.transport.read(peer, ranges, DRAM, 0.1)
        assert 0.1 <= time.monotonic() - started_s < 2.0
        reader.memory[:] = 0
    await nothing_arrives_late(source, reader)


@over_tcp
@pytest.mark.usefixtures("short_grace")
async def test_a_cancellation_ends_a_read(agent: Callable[..., Agent]) -> None:
    source, reader = filled(agent()), agent()
    peer = await reader.transport.connect(source.transport.metadata())
    with held(source):
        task = asyncio.create_task(reader.transport.read(peer, [reader.range_from(source, 0)], DRAM, 30.0))
        await _posted(reader)
        started_s = time.monotonic()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # an impatient caller
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - started_s < 2.0
        assert reader.transport._reads == [], "it ended while bytes might still arrive"  # type: ignore[attr-defined]
        reader.memory[:] = 0
    await nothing_arrives_late(source, reader)


@over_tcp
async def test_a_cancelled_read_does_not_harm_its_neighbours(agent: Callable[..., Agent]) -> None:
    """One client that goes away must not fail the pulls of all others from that worker."""
    source, reader = filled(agent()), agent()
    peer = await reader.transport.connect(source.transport.metadata())

    def read(slab: int) -> "asyncio.Task[int]":
        one = [reader.range_from(source, slab)]
        return asyncio.create_task(reader.transport.read(peer, one, DRAM, 5.0))

    with held(source):
        leaves, stays = read(0), read(1)
        await _posted(reader, 2)
        leaves.cancel()
        await asyncio.sleep(0)
    await stays
    with pytest.raises(asyncio.CancelledError):
        await leaves
    assert (reader.memory[SLAB_BYTES : 2 * SLAB_BYTES] == source.memory[SLAB_BYTES : 2 * SLAB_BYTES]).all()
    await read(2)


@over_nixl
async def test_a_cancellation_waits_for_a_read_that_is_still_to_be_posted(agent: Callable[..., Agent]) -> None:
    """Until then its slabs belong to it."""
    source, reader = filled(agent()), agent()
    peer = await reader.transport.connect(source.transport.metadata())
    with held(reader):
        task = asyncio.create_task(reader.transport.read(peer, [reader.range_from(source, 0)], DRAM, 30.0))
        await asyncio.sleep(0)
        task.cancel()
        assert not (await asyncio.wait({task}, timeout=0.1))[0], "it ended, and is posted afterwards"
    with pytest.raises(asyncio.CancelledError):
        await task
    reader.memory[:] = 0
    await nothing_arrives_late(source, reader)


@over_nixl
async def test_a_cancelled_connect_leaves_the_transport_working(agent: Callable[..., Agent]) -> None:
    source, reader = filled(agent()), agent()
    with held(reader):
        task = asyncio.create_task(reader.transport.connect(source.transport.metadata()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(5.0):
        peer = await reader.transport.connect(source.transport.metadata())
        await reader.transport.read(peer, [reader.range_from(source, 0)], DRAM, 5.0)


@over_tcp
async def test_closing_ends_reads_and_refuses_new_ones(agent: Callable[..., Agent]) -> None:
    source, reader = filled(agent()), agent()
    peer = await reader.transport.connect(source.transport.metadata())
    with held(source):
        one = [reader.range_from(source, 0)]
        task = asyncio.create_task(reader.transport.read(peer, one, DRAM, 30.0))
        await _posted(reader)
        await asyncio.to_thread(reader.transport.close)
        with pytest.raises(errors.TransferError, match="closing"):
            await task
    async with asyncio.timeout(2.0):
        with pytest.raises(errors.TransferError, match="closed"):
            await reader.transport.read(peer, one, DRAM, 1.0)
        with pytest.raises(errors.TransferError, match="closed"):
            await reader.transport.connect(source.transport.metadata())


@over_nixl
async def test_memory_that_is_not_registered(agent: Callable[..., Agent]) -> None:
    """Neither the peer's nor our own; and the refusal harms nobody."""
    source, reader = filled(agent()), agent()
    stranger = ctypes.create_string_buffer(SLAB_BYTES)
    good = reader.range_from(source, 0)
    for bad in (
        good._replace(remote_address=source.arena.address(0) - 4096),
        good._replace(remote_address=source.arena.address(7) + 4096),
        good._replace(local_address=ctypes.addressof(stranger)),
    ):
        peer = await reader.transport.connect(source.transport.metadata())
        with pytest.raises(errors.TransferError):
            await reader.transport.read(peer, [bad], DRAM, 5.0)
    peer = await reader.transport.connect(source.transport.metadata())
    await reader.transport.read(peer, [good], DRAM, 5.0)


@over_nixl
async def test_news_make_it_poll_more_often(agent: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    """And only for a while: waiting for readers costs little."""
    monkeypatch.setattr(nixl_module, "_LIVELY_S", 0.5)
    transport: Any = agent().transport
    assert transport._pause_s() == nixl_module._POLL_IDLE_S
    transport.expect_readers(True)
    await until(lambda: transport._pause_s() == nixl_module._POLL_LIVELY_S, "it has news")
    await until(lambda: transport._pause_s() == nixl_module._POLL_BUSY_S, "it has calmed down")
    transport.expect_readers(False)
    assert transport._pause_s() == nixl_module._POLL_IDLE_S


async def _posted(reader: Agent, count: int = 1) -> None:
    transport: Any = reader.transport
    await until(lambda: len([r for r in transport._reads if r.handle is not None]) == count, "the read is under way")


async def test_it_polls_on_although_a_pause_is_over_before_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one is when others have the processor meanwhile, about once in some thousand times; nothing else would end a
    read then. Only the first pause after something to do was ever in danger: here it is every other one."""
    monkeypatch.setattr(nixl_module, "_POLL_BUSY_S", 1e-9)
    monkeypatch.setattr(nixl_module, "_POLL_LIVELY_S", 1e-9)
    polls = 0
    with agents(NixlTransport) as open_agent:
        transport: Any = open_agent().transport

        def progress() -> None:
            nonlocal polls
            polls += 1
            if polls % 2:
                transport._inbox.put(lambda: None)

        monkeypatch.setattr(transport._lender, "progress", progress)
        transport.expect_readers(True)
        await until(lambda: polls > 10_000, "it polls", timeout_s=20)
