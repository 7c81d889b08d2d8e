"""Which worker or kvstore holds which blocks: holders write it to Redis, everyone else keeps a view of it.

Keys, all with a TTL: `zs:{cluster}:blocks:{id}` (hash: head, and the parent of each block by the block's name),
`zs:{cluster}:events` (stream of all changes). A holder numbers its changes; who misses a number reads its whole entry
again. The directory is a hint: what it says may be a few milliseconds old, or older while Redis is away.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError, ResponseError

from zipserve.common import log
from zipserve.common.kv.changes import Change, PendingChanges, outcome, read_blocks, read_event, read_head, told
from zipserve.common.kv.holders import HolderKey, Holders
from zipserve.common.redis_client import Field, connect, deadline, passed, writer_pause_s
from zipserve.common.registry import RegistryView
from zipserve.common.settings import ServiceSettings
from zipserve.v1.directory_pb2 import BlockEvent, EntryHead, EntryReset

_log = log.get()
_HEAD = b"head"
_EVENT = b"event"
_EVENTS_MAX = 4096
"""Length of the stream, about."""
_PENDING_NAMES_MAX = 1 << 16
_GATHER_S = 0.004
"""Changes that come so soon after each other are written together."""
_FIELDS_MAX = 1024
"""Fields that are written or read at once: neither Redis nor our event loop serves anybody else during it."""
_READ_EVENTS_MAX = 64
_BLOCK_S = 0.25


def _events_key(settings: ServiceSettings) -> str:
    return f"zs:{settings.cluster}:events"


def _blocks_key(settings: ServiceSettings, worker_id: str) -> str:
    return f"zs:{settings.cluster}:blocks:{worker_id}"


def _position(event_id: bytes) -> tuple[int, int]:
    time_ms, _, count = event_id.partition(b"-")
    return int(time_ms), int(count)


class DirectoryWriter:
    """Keeps one holder's entry true while the context is open, and takes it away in the end.

    All on the event loop. Whatever goes wrong with Redis, the entry is written anew as soon as it can be.

    Args:
        incarnation: of this process; an entry that another one left under our id is replaced.
        snapshot: gives name and parent of every block that can be found at the moment.
    """

    def __init__(
        self, settings: ServiceSettings, incarnation: int, snapshot: Callable[[], Iterable[tuple[bytes, bytes]]]
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._snapshot = snapshot
        self._key = _blocks_key(settings, settings.worker_id)
        self._pending = PendingChanges(_PENDING_NAMES_MAX)
        self._is_stale = True
        """Whether the entry is to be written anew; changes need not be kept until then."""
        self._number = 0
        self._head = b""
        """The one that was written last."""
        self._closing = asyncio.Event()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._redis = connect(settings)

    async def __aenter__(self) -> "DirectoryWriter":
        failures = await self._try_write(0)
        self._task = asyncio.create_task(self._run(failures), name="directory-writer")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        self._woken.set()
        if self._task is not None:
            await self._task
            with suppress(RedisError, OSError):
                await self._take_away()
        await self._redis.aclose()

    def added(self, parent: bytes, names: Sequence[bytes]) -> None:
        """Blocks that stand behind each other can be found from now on.

        Args:
            parent: name of the block before the first of them; empty when that is block 0.
        """
        if not self._is_stale:
            self._pending.added(parent, names)
            self._changed()

    def evicted(self, names: Sequence[bytes]) -> None:
        """Blocks cannot be found any more."""
        if not self._is_stale:
            self._pending.evicted(names)
            self._changed()

    def _changed(self) -> None:
        if self._pending.is_full:
            self._give_up()
        self._woken.set()

    def _give_up(self) -> None:
        """Forgets single changes in favour of a new entry."""
        self._pending.take()
        self._is_stale = True

    async def _run(self, failures: int) -> None:
        while True:
            event = self._closing if failures else self._woken  # a change is no reason to try again sooner
            if await passed(event, writer_pause_s(self._settings, failures)):
                await asyncio.sleep(_GATHER_S)
            if self._closing.is_set():
                return
            self._woken.clear()
            failures = await self._try_write(failures)

    async def _try_write(self, failures: int) -> int:
        """Returns how often it has failed by now."""
        try:
            await self._write()
        except (RedisError, OSError) as error:
            self._give_up()
            if not failures:
                _log.warning("directory.unreachable", error=str(error))
            return failures + 1
        if failures:
            _log.info("directory.recovered", failures=failures)
        return 0

    async def _write(self) -> None:
        """Writes what there is to write, be it that we live. A number is never used twice, whatever becomes of it."""
        count = await self._lay_out() if self._is_stale else None
        changes: Sequence[Change | EntryReset] = self._pending.take() if count is None else [EntryReset()]
        expected = self._head
        async with deadline(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hget(self._key, _HEAD)
            pipe.hlen(self._key)
            self._put(pipe, outcome(changes))
            for change in changes:
                self._tell(pipe, change)
            if changes:
                self._head = EntryHead(incarnation=self._incarnation, number=self._number).SerializeToString()
                pipe.hset(self._key, mapping={_HEAD: self._head})
            pipe.pexpire(self._key, self._ttl_ms)
            pipe.pexpire(_events_key(self._settings), 4 * self._ttl_ms)
            found, found_count, *_ = await pipe.execute()
        if found != expected if count is None else found_count != count:
            _log.info("directory.lost", changes=len(changes))
            self._give_up()
            self._woken.set()

    async def _lay_out(self) -> int:
        """Writes all blocks, piece by piece, and returns their number. Nobody believes an entry without a head."""
        async with deadline():
            await self._redis.unlink(self._key)  # fails before a snapshot is taken for a Redis that is away
        self._is_stale = False
        blocks = dict(self._snapshot())
        rest = iter(blocks.items())
        while fields := dict[Field, Field](islice(rest, _FIELDS_MAX)):
            async with deadline(), self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(self._key, mapping=fields)
                pipe.pexpire(self._key, self._ttl_ms)
                await pipe.execute()
        return len(blocks)

    @property
    def _ttl_ms(self) -> int:
        return round(self._settings.registry_ttl_s * 1000)

    def _put(self, pipe: Pipeline, parents: Mapping[bytes, bytes | None]) -> None:
        gone = iter([name for name, parent in parents.items() if parent is None])
        there = iter([(name, parent) for name, parent in parents.items() if parent is not None])
        while names := list(islice(gone, _FIELDS_MAX)):
            pipe.hdel(self._key, *names)
        while fields := dict[Field, Field](islice(there, _FIELDS_MAX)):
            pipe.hset(self._key, mapping=fields)

    def _tell(self, pipe: Pipeline, change: Change | EntryReset) -> None:
        self._number += 1
        fields: dict[Any, Any] = {_EVENT: told((self._settings.worker_id, self._incarnation), self._number, change)}
        pipe.xadd(_events_key(self._settings), fields, maxlen=_EVENTS_MAX, approximate=True)

    async def _take_away(self) -> None:
        async with deadline(), self._redis.pipeline(transaction=True) as pipe:
            await pipe.watch(self._key)
            head = read_head(await pipe.hget(self._key, _HEAD.decode()))
            if head is None or head.incarnation != self._incarnation:
                return  # our next life has been faster
            pipe.multi()  # type: ignore[no-untyped-call]  # redis-py has none there
            pipe.delete(self._key)
            self._tell(pipe, EntryReset())
            await pipe.execute()


def _ignore(holder: HolderKey, names: Sequence[bytes]) -> None:
    """Nobody has to be told."""


class DirectoryView:
    """Keeps `holders` true while the context is open: blocks of all holders that the registry shows.

    Args:
        holders: filled here; holders of others in it stay as they are.
        on_added: called with the blocks that a holder did not have before, in any order.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        registry: RegistryView,
        holders: Holders,
        on_added: Callable[[HolderKey, Sequence[bytes]], None] = _ignore,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._holders = holders
        self._on_added = on_added
        self._numbers: dict[HolderKey, int] = {}
        """Up to which change we know what a holder has."""
        self._position: tuple[int, int] | None = None
        """Id of the newest event that was read; None before the first look."""
        self._check_at_s = 0.0
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._redis = connect(settings)
        self.reachable = False
        """Whether Redis was there when it was last read."""

    async def __aenter__(self) -> "DirectoryView":
        await self._try(self._check)
        self._task = asyncio.create_task(self._run(), name="directory-view")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        if self._task is not None:
            await self._task
        await self._redis.aclose()

    async def _run(self) -> None:
        while not self._closing.is_set():
            if not await self._try(self._turn):
                await passed(self._closing, self._settings.heartbeat_s)

    async def _try(self, look: Callable[[], Awaitable[None]]) -> bool:
        try:
            await look()
            self.reachable = True
        except (RedisError, OSError) as error:
            if self.reachable:
                _log.warning("directory.unreachable", error=str(error))
            self.reachable = False
            self._check_at_s = 0.0
        return self.reachable

    async def _turn(self) -> None:
        rest_s = self._check_at_s - time.monotonic()
        if rest_s <= 0:
            await self._check()
        else:
            await self._follow(min(rest_s, _BLOCK_S))

    async def _check(self) -> None:
        """Compares what we know with the registry and with every entry's head, once a heartbeat."""
        self._check_at_s = time.monotonic() + self._settings.heartbeat_s
        for holder in [holder for holder in self._numbers if not self._is_alive(holder)]:
            self._forget(holder)
        heads = await self._read_heads()
        while not await self._follow() and not self._closing.is_set():
            pass
        # what the heads tell is in the stream, which was read to its end after them
        for holder, number in heads.items():
            if self._numbers.get(holder, -1) < number:
                await self._read_entry(holder)

    def _is_alive(self, holder: HolderKey) -> bool:
        record = self._registry.find(holder[0])
        return record is not None and record.incarnation == holder[1]

    def _forget(self, holder: HolderKey) -> None:
        del self._numbers[holder]
        self._holders.drop(holder)

    async def _read_heads(self) -> dict[HolderKey, int]:
        """Numbers of the entries of all who live; also finds out whether the stream has begun anew."""
        records = self._registry.records()
        async with deadline(), self._redis.pipeline(transaction=False) as pipe:
            pipe.xrevrange(_events_key(self._settings), count=1)
            for record in records:
                pipe.hget(_blocks_key(self._settings, record.worker_id), _HEAD.decode())
            newest, *values = await pipe.execute(raise_on_error=False)
        if not isinstance(newest, ResponseError):
            self._see_end(_position(newest[0][0]) if newest else (0, 0))
        numbers = {}
        for record, head in zip(records, map(read_head, values), strict=True):
            if head is not None and head.incarnation == record.incarnation:
                numbers[record.worker_id, record.incarnation] = head.number
        return numbers

    def _see_end(self, newest: tuple[int, int]) -> None:
        """Whoever starts needs no history. A stream that ends before what we have read is another one."""
        if self._position is None:
            self._position = newest
        elif newest < self._position:
            self._position = (0, 0)

    async def _follow(self, block_s: float | None = None) -> bool:
        """Reads some events, for which it waits if it is told to; whether there were no more."""
        position = "{}-{}".format(*(self._position or (0, 0)))
        block_ms = None if block_s is None else max(1, round(block_s * 1000))  # 0 would be for ever
        async with deadline():
            answer: Any = await self._redis.xread({_events_key(self._settings): position}, _READ_EVENTS_MAX, block_ms)
        entries = answer[0][1] if answer else []
        unclear: dict[HolderKey, None] = {}  # their entries tell what further events do
        for event_id, fields in entries:
            self._position = _position(event_id)
            event = read_event(fields.get(_EVENT))
            if event is None:
                _log.debug("block_event.unreadable", position=event_id)
                continue
            holder = (event.worker_id, event.incarnation)
            if holder not in unclear and not self._apply(holder, event):
                unclear[holder] = None
        for holder in unclear:
            await self._read_entry(holder)
        return len(entries) < _READ_EVENTS_MAX

    def _apply(self, holder: HolderKey, event: BlockEvent) -> bool:
        """False when the holder's entry is to be read instead."""
        if not self._is_alive(holder):
            return True  # or does not live yet: then the registry will show it, and we shall look at its entry
        number = self._numbers.get(holder)
        if number is None or event.HasField("reset"):
            return event.number == number
        if event.number != number + 1:
            return event.number <= number
        if event.HasField("added"):
            self._tell(holder, self._holders.add(holder, event.added.parent, event.added.names))
        elif event.HasField("evicted"):
            self._holders.remove(holder, event.evicted.names)
        else:
            return False
        self._numbers[holder] = event.number
        return True

    async def _read_entry(self, holder: HolderKey) -> None:
        """Piece by piece: what changes meanwhile is in events behind the head, which are all still to come."""
        key = _blocks_key(self._settings, holder[0])
        row: dict[bytes, bytes] = {}
        cursor: int | None = None
        try:
            async with deadline():
                head = read_head(await self._redis.hget(key, _HEAD.decode()))
            while cursor != 0 and not self._closing.is_set():
                async with deadline():
                    answer: Any = await self._redis.hscan(key, cursor or 0, count=_FIELDS_MAX)
                cursor, piece = answer
                row |= piece
        except ResponseError as error:
            _log.debug("entry.unreadable", peer=holder[0], error=repr(error))
            return
        if self._closing.is_set() or not self._is_alive(holder):
            return
        if not row and holder in self._numbers:
            self._forget(holder)
        if head is None or head.incarnation != holder[1]:
            return
        row.pop(_HEAD, None)
        blocks = read_blocks(row.items())
        if len(blocks) < len(row):
            _log.debug("entry.malformed", peer=holder[0], fields=len(row) - len(blocks))
        self._numbers[holder] = head.number
        self._tell(holder, self._holders.replace(holder, blocks))

    def _tell(self, holder: HolderKey, names: Sequence[bytes]) -> None:
        if names:
            self._on_added(holder, names)
