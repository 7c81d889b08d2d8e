"""A file of equal slots, each a record and a slab. Whatever interrupts a write is noticed by whoever reads the slot.

A slot is written in three steps: a record of before is blanked, the slab is written, then the record. A process that
is killed leaves the steps in this order, so that there is no record or the right one. After a loss of power any of the
pages may be the old one; the record, which has a digest and names the slab's checksum, then does not go with the slab.
Nothing is synced: what is lost can be computed again.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from zipserve.common.errors import BlockCorruptError, LayoutMismatchError, TransferError
from zipserve.common.kv.header import verify
from zipserve.kvstore.record import FIELDS_BYTES, NO_RECORD, RECORD_BYTES, Record


class SlotFile:
    """May be used by any number of threads, as long as nobody writes to a slot that another one uses.

    Args:
        slab_bytes: most bytes of a slab; a multiple of RECORD_BYTES.
    """

    def __init__(self, descriptor: int, slab_bytes: int) -> None:
        self._descriptor = descriptor
        self._slot_bytes = RECORD_BYTES + slab_bytes

    @classmethod
    def open(cls, path: Path, slab_bytes: int, slots: int) -> Self:
        """Opens a file, which begins to exist, and is cut to so many slots if it has more.

        Raises:
            OSError: that is not possible.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = cls(os.open(path, flags, mode=0o600), slab_bytes)
        try:
            size_bytes = slots * file._slot_bytes
            if file.size_bytes > size_bytes:
                os.truncate(file._descriptor, size_bytes)
        except BaseException:
            file.close()
            raise
        return file

    @property
    def size_bytes(self) -> int:
        """Of the file, holes included."""
        return os.fstat(self._descriptor).st_size

    def records(self) -> Iterator[tuple[int, Record | BlockCorruptError | LayoutMismatchError]]:
        """What each slot has for a record, or why that is none; empty slots are left out.

        Raises:
            OSError: the file cannot be read.
        """
        for slot in range(-(-self.size_bytes // self._slot_bytes)):
            try:
                record = Record.unpack(os.pread(self._descriptor, FIELDS_BYTES, slot * self._slot_bytes))
            except (BlockCorruptError, LayoutMismatchError) as error:
                yield slot, error
            else:
                if record is not None:
                    yield slot, record

    def blank(self, slot: int) -> None:
        """Takes the record of a slot away.

        Raises:
            OSError.
        """
        self._write(NO_RECORD, slot * self._slot_bytes)

    def write_slab(self, slot: int, slab: memoryview) -> None:
        """Writes a slab into a slot that has no record.

        Raises:
            OSError.
        """
        self._write(slab, slot * self._slot_bytes + RECORD_BYTES)

    def write_record(self, slot: int, record: Record) -> None:
        """Makes a slot whose slab is written one that can be found again.

        Raises:
            OSError.
        """
        self._write(record.pack(), slot * self._slot_bytes)

    def read(self, slot: int, expected: tuple[bytes, int], slab: memoryview) -> None:
        """Reads a slab and checks it against its record, and that against what is expected.

        Args:
            expected: name of the block, and checksum of the slab.
            slab: where it goes to, exactly as large as it is; what is in it after an error is void.

        Raises:
            TransferError: the file cannot be read.
            HandoffError: of the class that tells what was wrong.
        """
        page = bytearray(RECORD_BYTES)
        try:
            os.preadv(self._descriptor, [page, slab], slot * self._slot_bytes)
        except OSError as error:
            raise TransferError(f"slot {slot} cannot be read: {error}") from error
        record = Record.unpack(memoryview(page))
        if record is None or (record.name, record.checksum) != expected:
            raise BlockCorruptError(f"slot {slot} has {'no' if record is None else 'another'} record")
        # where the file ends early, the slab's memory has the bytes of before, which do not match
        verify(slab, record.identity, record.checksum)

    def close(self) -> None:
        """Nobody may use the file any more."""
        os.close(self._descriptor)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[written:], offset + written
