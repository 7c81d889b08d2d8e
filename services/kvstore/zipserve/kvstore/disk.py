"""Blocks on disk, which outlive the store's memory and its process.

A folder for each layout holds one file of slots (`zipserve.kvstore.slots`) for each kind of slab, and a lock. Which
block is in which slot is known from the records in the files alone; a `PrefixIndex` over the slots' numbers is built
from them at the start, and decides what makes room.

Slots stay sparse until they are written. Reserving the space of all of them would take it from others before there is
anything to keep, costs a pass of zeros where the file system cannot do it at once, and needs room for as many sinks as
blocks, of which few are used. The price is that a disk can be full before the slots are: those that find no space are
then given up until the next start, so that the tier goes on with as many as there is space for.

Bookkeeping belongs to one thread, the event loop's; only `store` and `load` read and write, in any other. What a slot
that is being used holds, stays: its slab is held in the pools.
"""

import errno
import fcntl
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from zipserve.common import log
from zipserve.common.errors import BlockCorruptError, HandoffError, InternalError, UnavailableError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.pools import SlabPools, Slabs
from zipserve.common.kv.prefix_index import CachedBlock, PrefixIndex
from zipserve.common.kv.refs import identity_of
from zipserve.kvstore.record import Record, chains
from zipserve.kvstore.slots import SlotFile
from zipserve.v1.kv_pb2 import BlockRef

_log = log.get()
_FILES = {SlabKind.BLOCK: "blocks", SlabKind.SINKS: "sinks"}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(eq=False)
class Reservation:
    """Slots for one block, and what will stand in them before its slabs."""

    run: list[CachedBlock]
    """The blocks before it, on disk; it is added to them when it is written."""
    records: list[tuple[int, Record]]
    """Slot and record of each of its slabs: of the sinks, if it has any, then of the block."""
    slabs: Slabs
    """Held: its own slots, and those of the run."""
    stale: set[tuple[SlabKind, int]]
    """Slots, its own or free ones, whose records are to be blanked before."""
    is_writing: bool = False
    is_stored: bool = False
    error: OSError | None = None
    """Why it could not be written."""


@dataclass
class DiskCounts:
    """What has happened to blocks since the start."""

    stored: int = 0
    failed: int = 0
    """That could not be written."""
    discarded: int = 0
    """That were not what they should be, and those behind them."""
    slots_lost: int = 0
    """Slots of any kind for which there is no space."""


class DiskTier:
    """Blocks of one layout; see `open`.

    One block is written at a time: `reserve`, `store` in a thread, `commit`. Any number is read: `find`, `hold`, `load`
    in a thread, `release`; and `discard` where that raised. `index.on_evicted` tells which blocks make room for others.
    """

    def __init__(self, layout: Layout, blocks: int, files: dict[SlabKind, SlotFile]) -> None:
        self._layout = layout
        self._files = files
        self._resources = ExitStack()
        self._pools = SlabPools(layout, blocks=blocks, tails=0, sinks=blocks)
        self.index = PrefixIndex(self._pools)
        self.counts = DiskCounts()
        self._stale: set[tuple[SlabKind, int]] = set()
        """Slots that are free and may still have a record; no other one has."""
        self._used: set[tuple[SlabKind, int]] = set()
        """Slots that have held a slab, so that there is space for them."""
        self._open: Reservation | None = None
        self._is_failing = False

    @classmethod
    def open(cls, path: Path, layout: Layout, blocks: int) -> Self:
        """Opens the folder of a layout below `path`, and finds the blocks in it. Reads a page of each slot.

        Args:
            blocks: slots for blocks; what lies beyond them in the files is cut off.

        Raises:
            UnavailableError: another store uses the folder.
            OSError: the folder or a file cannot be made, read or written.
        """
        folder = path / layout.fingerprint.hex()[:32]
        path.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        with ExitStack() as resources:
            _lock(folder, resources)
            files = {}
            for kind in (SlabKind.BLOCK, *((SlabKind.SINKS,) if layout.has_sinks else ())):
                files[kind] = SlotFile.open(folder / _FILES[kind], layout.slab_bytes(kind), blocks)
                resources.callback(files[kind].close)
            tier = cls(layout, blocks, files)
            dropped = tier._recover()
            tier._resources = resources.pop_all()
        (_log.warning if dropped else _log.info)("disk.opened", folder=str(folder), blocks=len(tier), dropped=dropped)
        return tier

    def __len__(self) -> int:
        return len(self.index)

    def find(self, names: Sequence[bytes]) -> list[CachedBlock]:
        """The longest run of blocks, from the first name on, that is here."""
        return self.index.find(names)

    def note_request(self, names: Sequence[bytes]) -> None:
        """Counts the use of a sequence, whether its blocks are here or not; once, before any of them is written."""
        self.index.note_request(names)

    def reserve(
        self, run: list[CachedBlock], name: bytes, refs: Sequence[BlockRef], incarnation: int
    ) -> Reservation | None:
        """Takes slots for the block behind a run. None: it is here already, or the run is not any more, or all slots
        are in use.

        Args:
            name: the whole name, of 32 bytes.
            refs: of its slabs, as they will be given to `store`: sinks, if it is block 0 and the codec has any; block.
            incarnation: that sealed them.

        Raises:
            InternalError: another block is being written.
        """
        if self._open is not None:
            raise InternalError("a block is to be written to disk while another one is")
        if name in self.index or (run and self.index.get(run[-1].name) is not run[-1]):
            return None
        slabs = self.index.hold(run)
        if not self._pools.try_extend(slabs, (len(run) + 1) * self._layout.block_tokens):
            self._pools.give_back(slabs)
            return None
        records = self._records(slabs, run[-1].name if run else b"", name, refs, incarnation)
        self._open = Reservation(run, records, slabs, self._stale)
        self._stale = set()
        return self._open

    def store(self, reservation: Reservation, slabs: Sequence[memoryview]) -> None:
        """Writes the slabs, in any thread; `commit` tells whether that went well.

        Args:
            slabs: sealed, in the order of the refs; what follows a slab's bytes is not written.
        """
        reservation.is_writing = True
        try:
            places = [(self._files[record.identity.kind], slot, record) for slot, record in reservation.records]
            for kind, slot in reservation.stale:
                self._files[kind].blank(slot)
            for (file, slot, record), slab in zip(places, slabs, strict=True):
                file.write_slab(slot, slab[: record.slab_bytes])
            for file, slot, record in places:
                file.write_record(slot, record)
            reservation.is_stored = True
        except OSError as error:
            reservation.error = error
        finally:
            reservation.is_writing = False

    def commit(self, reservation: Reservation) -> bool:
        """Adds a block that was written to the index, and to the run. Whether it is there: not if writing has failed,
        or if the run was discarded meanwhile; its slots are free then.

        Raises:
            InternalError: `store` has not returned, so that the slots are still written to.
        """
        return self._end(reservation, is_kept=reservation.is_stored)

    def abandon(self, reservation: Reservation) -> None:
        """Frees the slots of a block that is not to be kept, written or not.

        Raises:
            InternalError: see `commit`.
        """
        self._end(reservation, is_kept=False)

    def hold(self, run: Sequence[CachedBlock]) -> Slabs:
        """Keeps the blocks of a run that was just found where they are, until `release`."""
        return self.index.hold(run)

    def load(self, block: CachedBlock, slabs: Sequence[memoryview]) -> None:
        """Reads and checks the slabs of a block that is held, in any thread.

        They are as they were stored: sealed by whichever incarnation did that.

        Args:
            slabs: where they go to, in the order of `block.refs`; after an error, what is in them is void.

        Raises:
            HandoffError: of the class that tells what was wrong.
        """
        for ref, slab in zip(block.refs, slabs, strict=True):
            self._files[SlabKind(ref.kind)].read(ref.slab, (block.name, ref.checksum), slab[: ref.bytes])

    def release(self, slabs: Slabs) -> None:
        """Ends a `hold`."""
        self._pools.give_back(slabs)

    def discard(self, block: CachedBlock, error: HandoffError) -> list[bytes]:
        """Takes out a block that could not be loaded, and all behind it; returns the names of those that were here."""
        gone = [one.name for one in self.index.discard(block)]
        self.counts.discarded += len(gone)
        if gone:
            _log.warning("disk.discarded", block=block.name.hex(), blocks=len(gone), error=error.message)
        return gone

    def close(self) -> None:
        """Ends the use of the folder, when nothing is written or held any more."""
        with suppress(OSError):
            for kind, slot in self._stale:
                self._files[kind].blank(slot)
        self._resources.close()

    def _records(
        self, slabs: Slabs, parent: bytes, name: bytes, refs: Sequence[BlockRef], incarnation: int
    ) -> list[tuple[int, Record]]:
        records = []
        for ref in refs:
            sinks_checksum = refs[0].checksum if len(refs) > 1 else 0
            identity = replace(identity_of(ref, self._layout.fingerprint, incarnation), prefix_hash=name)
            record = Record(identity, parent, ref.checksum, sinks_checksum)
            records.append((slabs.of(identity.kind)[-1], record))
        return records

    def _end(self, reservation: Reservation, *, is_kept: bool) -> bool:
        if reservation is not self._open or reservation.is_writing:
            raise InternalError("a write to disk is to end that is still going on, or that has ended before")
        self._open = None
        own = [(record.identity.kind, slot) for slot, record in reservation.records]
        if reservation.is_stored:
            self._used.update(own)
        else:
            self._stale |= reservation.stale
        self._note_outcome(reservation, own)
        refs = [record.ref(slot) for slot, record in reservation.records]
        is_here = is_kept and self.index.extend(reservation.run, reservation.records[0][1].name, refs)
        self._pools.give_back(reservation.slabs)
        self.counts.stored += is_here
        return is_here

    def _note_outcome(self, reservation: Reservation, own: list[tuple[SlabKind, int]]) -> None:
        error = reservation.error
        if error is None:
            if reservation.is_stored and self._is_failing:
                self._is_failing = False
                _log.info("disk.write_recovered", failed=self.counts.failed, slots_lost=self.counts.slots_lost)
            return
        self.counts.failed += 1
        if not self._is_failing:
            self._is_failing = True
            _log.warning("disk.write_failed", error=str(error))
        if error.errno in _NO_SPACE:
            for kind, slot in own:
                if (kind, slot) not in self._used:  # held for ever, so that the next block gets another one
                    reservation.slabs.of(kind).remove(slot)
                    self.counts.slots_lost += 1

    def _recover(self) -> dict[str, int]:
        """Builds the index from the records, and blanks those that it cannot use; returns how many by the reason."""
        found: dict[SlabKind, dict[int, Record]] = {kind: {} for kind in self._files}
        dropped: list[tuple[SlabKind, int]] = []
        reasons: Counter[str] = Counter()
        for kind, file in self._files.items():
            for slot, record in file.records():
                if isinstance(record, Record) and record.fits(self._layout, kind):
                    found[kind][slot] = record
                else:
                    dropped.append((kind, slot))
                    reasons["torn" if isinstance(record, BlockCorruptError) else "foreign"] += 1
        pools = self._pools
        every = Slabs(sinks=pools.sinks.take(pools.sinks.count), blocks=pools.blocks.take(pools.blocks.count))
        for block in chains(found, self._layout):
            parent = self.index.get(block.parent)
            self.index.extend([parent] if parent else [], block.name, block.refs)
        self._used.update(slot for block in self.index for slot in block.slabs)
        loose = [(kind, slot) for kind, slots in found.items() for slot in slots if (kind, slot) not in self._used]
        for kind, slot in [*dropped, *loose]:
            self._files[kind].blank(slot)
        pools.give_back(every)
        pools.on_free = self._note_free
        return {**reasons, **({"loose": len(loose)} if loose else {})}

    def _note_free(self, kind: SlabKind, slot: int) -> None:
        self._stale.add((kind, slot))


def _lock(folder: Path, resources: ExitStack) -> None:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode=0o600)
    resources.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UnavailableError(f"{folder} is in use by another store") from error
