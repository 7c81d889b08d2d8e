"""Who holds which blocks, as far as is known here: a local index over the blocks of many holders. Pure."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeAlias

HolderKey: TypeAlias = tuple[str, int]
"""worker_id and incarnation of a worker or kvstore."""


@dataclass(slots=True)
class _Known:
    parent: bytes
    holders: set[HolderKey] = field(default_factory=set)


class Holders:
    """Blocks by name, with their holders and the blocks before them. Not thread-safe.

    What a name costs is freed with its last holder. A name tells all tokens up to the end of its block, so that all
    holders agree about its parent; should one not, then the newest word counts.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, _Known] = {}
        self._names: dict[HolderKey, set[bytes]] = {}

    def __len__(self) -> int:
        """Number of the blocks that somebody holds."""
        return len(self._blocks)

    def add(self, holder: HolderKey, parent: bytes, names: Sequence[bytes]) -> list[bytes]:
        """A holder has got blocks that stand behind each other.

        Args:
            parent: name of the block before the first of them; empty when that is block 0.

        Returns:
            Those that it did not hold before.
        """
        return self._enter(holder, zip(names, (parent, *names), strict=False))

    def remove(self, holder: HolderKey, names: Iterable[bytes]) -> None:
        """A holder has lost blocks; those that it did not hold are passed over."""
        held = self._names.get(holder, set())
        for name in names:
            if name in held:
                held.remove(name)
                self._release(holder, name)
        if not held:
            self._names.pop(holder, None)

    def replace(self, holder: HolderKey, entries: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
        """A holder has these blocks and no others.

        Args:
            entries: name and parent of each, in any order.

        Returns:
            Those that it did not hold before.
        """
        wanted = dict(entries)
        self.remove(holder, self.names_of(holder) - wanted.keys())
        return self._enter(holder, wanted.items())

    def drop(self, holder: HolderKey) -> None:
        """A holder is gone."""
        for name in self._names.pop(holder, set()):
            self._release(holder, name)

    def runs(self, names: Sequence[bytes]) -> dict[HolderKey, int]:
        """How many of the leading names each holder has, without those that lack the first one."""
        found: dict[HolderKey, int] = {}
        following: Set[HolderKey] = self._holders(names[0]) if names else frozenset()
        for count, name in enumerate(names):
            still = following & self._holders(name)
            found.update(dict.fromkeys(following - still, count))
            following = still
            if not following:
                break
        return found | dict.fromkeys(following, len(names))

    def chain(self, name: bytes) -> list[bytes]:
        """The names from block 0 to this one; empty when somebody holds not all of them."""
        names: list[bytes] = []
        while name in self._blocks and len(names) < len(self._blocks):  # a ring would have no end
            names.append(name)
            name = self._blocks[name].parent
        return [] if name else names[::-1]

    def holders(self) -> Set[HolderKey]:
        """All who hold a block."""
        return self._names.keys()

    def names_of(self, holder: HolderKey) -> Set[bytes]:
        """All that one holder has; it changes with the index."""
        return self._names.get(holder, frozenset())

    def _enter(self, holder: HolderKey, entries: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
        held = self._names.get(holder, set())
        new = []
        for name, parent in entries:
            known = self._blocks.get(name)
            if known is None:
                known = self._blocks[name] = _Known(parent)
            known.parent = parent
            known.holders.add(holder)
            if name not in held:
                held.add(name)
                new.append(name)
        if held:
            self._names[holder] = held
        return new

    def _release(self, holder: HolderKey, name: bytes) -> None:
        known = self._blocks[name]
        known.holders.remove(holder)
        if not known.holders:
            del self._blocks[name]

    def _holders(self, name: bytes) -> Set[HolderKey]:
        known = self._blocks.get(name)
        return known.holders if known else frozenset()
