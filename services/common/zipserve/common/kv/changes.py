"""Changes of what a holder has: how they are gathered, told, and read by those who believe nobody's bytes. Pure."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from google.protobuf.message import DecodeError

from zipserve.common.kv.holders import HolderKey
from zipserve.common.kv.prefix import HASH_BYTES
from zipserve.v1.directory_pb2 import BlockEvent, BlocksAdded, BlocksEvicted, EntryHead, EntryReset

Change: TypeAlias = BlocksAdded | BlocksEvicted
_CHANGE_NAMES_MAX = 256
"""Names that one change tells at most: with the length of the stream it limits what Redis has to keep."""


class PendingChanges:
    """Changes in the order in which they came. Neighbours of one kind are told as one.

    Args:
        names_max: most names that are kept; what is more is for the caller to see (`is_full`) and to give up.
    """

    def __init__(self, names_max: int) -> None:
        self._names_max = names_max
        self._changes: list[Change] = []
        self._names = 0

    @property
    def is_full(self) -> bool:
        """Whether more names came than are kept."""
        return self._names > self._names_max

    def added(self, parent: bytes, names: Sequence[bytes]) -> None:
        """Blocks that stand behind each other came; see `Holders.add`."""
        for name in names:
            change = self._open()
            if isinstance(change, BlocksAdded) and change.names[-1] == parent:
                change.names.append(name)
            else:
                self._changes.append(BlocksAdded(parent=parent, names=[name]))
            parent = name
            self._names += 1

    def evicted(self, names: Sequence[bytes]) -> None:
        """Blocks are gone."""
        for name in names:
            change = self._open()
            if isinstance(change, BlocksEvicted):
                change.names.append(name)
            else:
                self._changes.append(BlocksEvicted(names=[name]))
            self._names += 1

    def take(self) -> list[Change]:
        """All changes; none are left."""
        changes, self._changes, self._names = self._changes, [], 0
        return changes

    def _open(self) -> Change | None:
        """The newest change, if it takes one more name."""
        change = self._changes[-1] if self._changes else None
        return change if change is not None and len(change.names) < _CHANGE_NAMES_MAX else None


def outcome(changes: Sequence[Change | EntryReset]) -> dict[bytes, bytes | None]:
    """What the changes come to: for each name its parent, or None when its block is gone in the end."""
    parents: dict[bytes, bytes | None] = {}
    for change in changes:
        if isinstance(change, BlocksAdded):
            parents.update(zip(change.names, (change.parent, *change.names), strict=False))
        elif isinstance(change, BlocksEvicted):
            parents.update(dict.fromkeys(change.names))
    return parents


def told(holder: HolderKey, number: int, change: Change | EntryReset) -> bytes:
    """A change of a holder as a serialized BlockEvent."""
    event = BlockEvent(worker_id=holder[0], incarnation=holder[1], number=number)
    if isinstance(change, EntryReset):
        event.reset.CopyFrom(change)
    elif isinstance(change, BlocksAdded):
        event.added.CopyFrom(change)
    else:
        event.evicted.CopyFrom(change)
    return event.SerializeToString()


def read_event(value: object) -> BlockEvent | None:
    """A BlockEvent; None when it is none, or has a name that can be none."""
    try:
        event = BlockEvent.FromString(value) if isinstance(value, bytes) else None
    except DecodeError:
        return None
    if event is None or (event.added.parent and not _is_name(event.added.parent)):
        return None
    return event if all(map(_is_name, (*event.added.names, *event.evicted.names))) else None


def read_head(value: object) -> EntryHead | None:
    """An EntryHead; None when it is none."""
    try:
        return EntryHead.FromString(value) if isinstance(value, bytes) else None
    except DecodeError:
        return None


def read_blocks(row: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Those of some fields and values that can be a name and a parent."""
    return [(name, parent) for name, parent in row if _is_name(name) and (not parent or _is_name(parent))]


def _is_name(name: bytes) -> bool:
    return len(name) == HASH_BYTES
