"""The store's blocks: in memory, where peers read them, and on disk below, from where they are brought back.

What comes into memory is written to disk as well, soon after, so that memory can be given up at any time without a
wait, and what is on disk outlives the process. Lives in the event loop; bytes are moved in other threads.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from zipserve.common import log
from zipserve.common.errors import HandoffError
from zipserve.common.kv.holders import Holders
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.pools import Slabs
from zipserve.common.kv.prefix_index import CachedBlock, PrefixIndex
from zipserve.common.kv.seals import Seals
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.threads import in_thread
from zipserve.common.transfer.fetch import PrefixFetcher
from zipserve.kvstore.disk import DiskTier
from zipserve.v1.kv_pb2 import BlockRef

_log = log.get()
_WANTED_MAX = 4096
"""Blocks that are to be fetched; beyond, those that were heard of first are let go."""
_FETCH_S = 10.0


class Store:
    """A `Shelf` of two tiers.

    Args:
        index: of the blocks in memory.
        incarnation: that seals them.
        disk: None: there is no disk tier.
    """

    def __init__(
        self, index: PrefixIndex, seals: Seals, incarnation: int, disk: DiskTier | None, metrics: Metrics
    ) -> None:
        self.index = index
        self.seals = seals
        self._incarnation = incarnation
        self._disk = disk
        self._metrics = metrics
        self._wanted: OrderedDict[bytes, None] = OrderedDict()
        self._is_wanted = asyncio.Event()
        self._promoting = asyncio.Lock()

    def count(self, names: Sequence[bytes]) -> int:
        """Blocks of a sequence, from the first on, that are in memory or on disk."""
        return max(len(self.index.find(names)), len(self._disk.find(names)) if self._disk else 0)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Name of every block, and of the one before it (empty: none), which comes first."""
        if self._disk is not None:
            yield from self._disk.index.entries()
        for name, parent in self.index.entries():
            if not self._is_on_disk(name):
                yield name, parent

    def watch(self, added: Callable[[bytes, bytes], None], removed: Callable[[bytes], None]) -> None:
        """Says who is to be told of blocks (name, and that of the one before it) that come, and of those that go."""

        def came(block: CachedBlock) -> None:
            if not self._is_on_disk(block.name):
                added(block.name, block.parent.name if block.parent else b"")

        def left_memory(block: CachedBlock) -> None:
            if not self._is_on_disk(block.name):
                removed(block.name)

        def left_disk(block: CachedBlock) -> None:
            if block.name not in self.index:
                removed(block.name)

        self.index.on_added, self.index.on_removed = came, left_memory
        if self._disk is not None:
            self._disk.index.on_removed = left_disk

    async def bring(self, names: Sequence[bytes]) -> None:
        """Puts what is on disk of a sequence into memory, as far as there is room."""
        if self._disk is None:
            return
        self._disk.note_request(names)
        if self.count(names) == len(self.index.find(names)):
            return  # without a wait for those who need the disk
        async with self._promoting:
            on_disk = self._disk.find(names)
            if len(on_disk) > len(self.index.find(names)):
                await self._promote(self._disk, on_disk, names)

    def want(self, name: bytes) -> None:
        """Somebody holds a block, which is to be fetched with all before it."""
        self._wanted[name] = None
        if len(self._wanted) > _WANTED_MAX:
            self._wanted.popitem(last=False)
        self._is_wanted.set()

    async def run(self, fetcher: PrefixFetcher, holders: Holders) -> None:
        """Fetches what is wanted and writes it to disk, for ever."""
        while True:
            await self._is_wanted.wait()
            while self._wanted:
                name, _ = self._wanted.popitem()  # the newest is likely to stand behind others that are wanted
                names = holders.chain(name)
                for one in names:
                    self._wanted.pop(one, None)  # it comes with this one
                if names and self.count(names) < len(names):
                    await self.bring(names)  # what is here need not be fetched
                    await fetcher.fetch(names, Deadline(_FETCH_S), request_id="")
                if self._disk is not None:
                    await self._write(self._disk, names)
            self._is_wanted.clear()

    async def settled(self) -> None:
        """Returns when nothing is being read from disk, for calls that were cut either."""
        async with self._promoting:
            return

    async def _promote(self, disk: DiskTier, on_disk: Sequence[CachedBlock], names: Sequence[bytes]) -> None:
        pools, run = self.index.pools, self.index.find(names)
        first = len(run)
        held, slots = self.index.hold(run), disk.hold(on_disk)
        try:
            end = min(len(on_disk), first + pools.available(SlabKind.BLOCK))
            if not pools.try_extend(held, end * pools.block_tokens):
                return
            loaded, error = await in_thread(self._load, disk, on_disk[first:end], first, held)
            added = self.index.extend_or_join(run, names[first : first + len(loaded)], loaded, held)
            self._metrics.promoted_blocks.inc(added)
            if error is not None:
                disk.discard(on_disk[first + len(loaded)], error)
        finally:
            disk.release(slots)
            pools.give_back(held)

    def _load(
        self, disk: DiskTier, blocks: Sequence[CachedBlock], first: int, held: Slabs
    ) -> tuple[list[tuple[BlockRef, ...]], HandoffError | None]:
        """Reads blocks from disk and seals them anew, up to the first that is not what it should be."""
        loaded: list[tuple[BlockRef, ...]] = []
        for number, block in enumerate(blocks, first):
            slabs = held.of_block(number)
            try:
                disk.load(block, [self.seals.slab_view(*slab) for slab in slabs])
            except HandoffError as error:
                return loaded, error
            generations = [self.index.pools.generation(*slab) for slab in slabs]
            loaded.append(self.seals.seal_block(slabs, generations, number, block.name))
        return loaded, None

    async def _write(self, disk: DiskTier, names: Sequence[bytes]) -> None:
        """Writes those blocks of a sequence to disk that are in memory and not there yet."""
        run = self.index.find(names)
        on_disk = disk.find(names)
        if len(on_disk) >= len(run):
            return
        held = self.index.hold(run)
        try:
            disk.note_request(names)
            for block in run[len(on_disk) :]:
                reservation = disk.reserve(on_disk, block.name, block.refs, self._incarnation)
                if reservation is None:
                    return
                try:
                    views = [self.seals.slab_view(*slab) for slab in block.slabs]
                    await in_thread(disk.store, reservation, views)
                except BaseException:
                    disk.abandon(reservation)
                    raise
                if not disk.commit(reservation):
                    return
        finally:
            self.index.pools.give_back(held)

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        self.index.check_integrity()
        self.index.pools.check_integrity()
        if self._disk is not None:
            self._disk.index.check_integrity()

    def _is_on_disk(self, name: bytes) -> bool:
        return self._disk is not None and name in self._disk.index
