"""Who is alive: workers write heartbeats to Redis, everyone else reads a view of them.

Keys, all with a TTL: `zs:{cluster}:workers` (set of ids), `zs:{cluster}:worker:{id}` (hash: capabilities, load, beat).
Redis is never a liveness dependency: a writer that cannot reach it tries again, a reader keeps its last view.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError
from redis.exceptions import RedisError

from zipserve.common import log
from zipserve.common.redis_client import Field, connect, deadline, passed, writer_pause_s
from zipserve.common.settings import ServiceSettings
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

_log = log.get()


@dataclass(frozen=True)
class WorkerRecord:
    """A worker as the registry shows it."""

    capabilities: Capabilities
    load: Load
    beat: int
    """Number of the heartbeat; grows while the worker lives."""

    @property
    def worker_id(self) -> str:
        """Unique name."""
        return self.capabilities.worker_id

    @property
    def incarnation(self) -> int:
        """Drawn when the process started."""
        return self.capabilities.incarnation


def _index_key(cluster: str) -> str:
    return f"zs:{cluster}:workers"


def _worker_key(cluster: str, worker_id: str) -> str:
    return f"zs:{cluster}:worker:{worker_id}"


class RegistryWriter:
    """Keeps one worker's entry fresh while the context is open; its last beat says that the worker is going away.

    With `capabilities` None it does nothing: the router has no entry.
    """

    def __init__(self, settings: ServiceSettings, capabilities: Capabilities | None, load: Callable[[], Load]) -> None:
        self._settings = settings
        self._capabilities = capabilities
        self._load = load
        self._beat = 0
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._redis = connect(settings)

    async def __aenter__(self) -> "RegistryWriter":
        if self._capabilities is not None:
            with suppress(RedisError, OSError):
                await self._write()
            self._task = asyncio.create_task(self._run(), name="registry-writer")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        if self._task is not None:
            await self._task
            with suppress(RedisError, OSError):
                await self._write(leaving=True)
        await self._redis.aclose()

    async def _run(self) -> None:
        failures = 0
        was_draining = False
        while True:
            # a change to draining is written at once, not a heartbeat later
            for _ in range(10):
                if await passed(self._closing, writer_pause_s(self._settings, failures) / 10):
                    return
                if self._load().draining != was_draining:
                    was_draining = not was_draining
                    break
            try:
                await self._write()
                if failures:
                    _log.info("registry.recovered", failures=failures)
                failures = 0
            except (RedisError, OSError) as error:
                failures += 1
                if failures == 1:
                    _log.warning("registry.unreachable", error=str(error))

    async def _write(self, leaving: bool = False) -> None:
        assert self._capabilities is not None
        self._beat += 1
        load = Load()
        load.CopyFrom(self._load())
        load.draining = load.draining or leaving
        cluster, worker_id = self._settings.cluster, self._settings.worker_id
        ttl_ms = round(self._settings.registry_ttl_s * 1000)
        entry: dict[Field, Field] = {
            "capabilities": self._capabilities.SerializeToString(),
            "load": load.SerializeToString(),
            "beat": str(self._beat),
        }
        async with deadline(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_worker_key(cluster, worker_id), mapping=entry)
            pipe.pexpire(_worker_key(cluster, worker_id), ttl_ms)
            pipe.sadd(_index_key(cluster), worker_id)
            pipe.pexpire(_index_key(cluster), 4 * ttl_ms)
            await pipe.execute()


@dataclass
class _Entry:
    record: WorkerRecord
    seen_at_s: float
    suspect_since: int = field(default=-1)
    """Beat at which a caller reported the worker as lost; it is hidden until its beat moves on."""


class RegistryView:
    """All workers, refreshed in the background while the context is open."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._redis = connect(settings)
        self._entries: dict[str, _Entry] = {}
        self._changed = asyncio.Condition()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.reachable = False
        """Whether the last poll reached Redis."""

    async def __aenter__(self) -> "RegistryView":
        await self._try_refresh()
        self._task = asyncio.create_task(self._run(), name="registry-view")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        if self._task is not None:
            await self._task
        await self._redis.aclose()

    def workers(self, role: WorkerRole.ValueType) -> list[WorkerRecord]:
        """Workers of a role that are not draining nor reported as lost, sorted by id."""
        entries = sorted(self._entries.items())
        return [
            entry.record
            for _, entry in entries
            if entry.record.capabilities.role == role
            and not entry.record.load.draining
            and entry.suspect_since < entry.record.beat
        ]

    def find(self, worker_id: str) -> WorkerRecord | None:
        """One worker, draining or not."""
        entry = self._entries.get(worker_id)
        return entry.record if entry else None

    def records(self) -> list[WorkerRecord]:
        """All workers, draining or not, reported as lost or not."""
        return [entry.record for entry in self._entries.values()]

    def report_lost(self, record: WorkerRecord) -> None:
        """Hides a worker that could not be reached, until a later heartbeat shows that it lives."""
        entry = self._entries.get(record.worker_id)
        if entry is not None and entry.record.incarnation == record.incarnation:
            # the entry in Redis may be one beat ahead of our view
            entry.suspect_since = entry.record.beat + 1

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns after the next refresh that brought news, or after the time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait()

    async def refresh(self) -> None:
        """Reads Redis now, and takes the ids of the dead out of its index.

        Raises:
            RedisError, OSError: it cannot be reached; the view stays as it was.
        """
        async with deadline():
            rows = await self._read()
        now_s = time.monotonic()
        for worker_id, row in rows.items():
            if row:
                self._update(worker_id, row, now_s)
        # an entry that vanished without a farewell may have been lost with Redis' memory: keep it for one TTL
        stale_s = now_s - self._settings.registry_ttl_s
        self._entries = {i: e for i, e in self._entries.items() if e.seen_at_s > stale_s}

    async def _read(self) -> dict[str, dict[bytes, bytes]]:
        cluster = self._settings.cluster
        members = await self._redis.smembers(_index_key(cluster))
        ids = sorted(member.decode(errors="replace") for member in members if isinstance(member, bytes))
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker_id in ids:
                pipe.hgetall(_worker_key(cluster, worker_id))
            rows = dict(zip(ids, await pipe.execute(), strict=True))
        dead = [worker_id for worker_id, row in rows.items() if not row]
        if dead:  # should one of them live after all, then its next beat enters it again
            await self._redis.srem(_index_key(cluster), *dead)
        return rows

    def _update(self, worker_id: str, row: dict[bytes, bytes], now_s: float) -> None:
        try:
            record = WorkerRecord(
                Capabilities.FromString(row[b"capabilities"]), Load.FromString(row[b"load"]), int(row[b"beat"])
            )
        except (KeyError, ValueError, DecodeError) as error:
            _log.debug("worker.unreadable", peer=worker_id, error=repr(error))
            return
        if record.worker_id != worker_id:
            return  # nobody may speak for another one
        entry = self._entries.get(worker_id)
        if entry is not None and entry.record.incarnation == record.incarnation:
            entry.record, entry.seen_at_s = record, now_s
        else:
            self._entries[worker_id] = _Entry(record, now_s)
            if worker_id != self._settings.worker_id:
                _log.info("worker.seen", peer=worker_id, address=record.capabilities.address)

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
            self.reachable = True
        except (RedisError, OSError) as error:
            if self.reachable:
                _log.warning("registry.unreachable", error=str(error))
            self.reachable = False
            for entry in self._entries.values():
                entry.seen_at_s = time.monotonic()  # silence of Redis says nothing about a worker

    async def _run(self) -> None:
        while not await passed(self._closing, self._settings.heartbeat_s / 2):
            await self._try_refresh()
            async with self._changed:
                self._changed.notify_all()
