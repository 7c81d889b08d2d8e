"""Sealed blocks that stay in a worker's pools for whoever comes with the same prefix. Pure: it knows no memory.

The blocks form trees: a block stands behind the one that holds the tokens before it, and leaves before it. Whoever
holds the slab of a block here holds those of all blocks before it, so that what is in use never stands behind what is
not. Slabs that only the index holds are `idle` in the pools, and are given up when others need room.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from zipserve.common.kv.eviction import Duel
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.pools import SlabPools, Slabs
from zipserve.v1.kv_pb2 import BlockRef


@dataclass(eq=False)
class CachedBlock:
    """A block that can be found by its name."""

    name: bytes
    """Chained hash of all tokens up to its end."""
    refs: tuple[BlockRef, ...]
    """Of its slab, and before that of the sinks if it is block 0 and the codec has any."""
    parent: "CachedBlock | None"
    """The block before it; None for block 0."""
    children: dict[bytes, "CachedBlock"] = field(default_factory=dict)
    slabs: tuple[tuple[SlabKind, int], ...] = field(init=False)
    """Kind and number of each of its slabs."""

    def __post_init__(self) -> None:
        self.slabs = tuple((SlabKind(ref.kind), ref.slab) for ref in self.refs)


def _ignore(block: CachedBlock) -> None:
    """Nobody has to be told."""


class PrefixIndex:
    """Blocks by name. Not thread-safe: one thread owns it together with the pools.

    Args:
        blocks_max: most blocks that are held, in use or not; None: as many as there are slabs.
    """

    def __init__(self, pools: SlabPools, blocks_max: int | None = None) -> None:
        self.pools = pools
        self._blocks_max = pools.blocks.count if blocks_max is None else blocks_max
        self._blocks: OrderedDict[bytes, CachedBlock] = OrderedDict()
        """The one that was not used for longest comes first."""
        self._duel = Duel(self._blocks_max, self._blocks)
        self.on_added: Callable[[CachedBlock], None] = _ignore
        """Called with every block that can be found from now on."""
        self.on_removed: Callable[[CachedBlock], None] = _ignore
        """Called with every block that cannot be found any more."""
        pools.on_short = self.make_room

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[CachedBlock]:
        """All blocks, each after the one before it. Nothing may come or go meanwhile."""
        for block in self._blocks.values():
            if block.parent is None:
                yield from _subtree(block)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Name of every block, and of the one before it (empty: none), which comes first."""
        for block in self:
            yield block.name, block.parent.name if block.parent else b""

    @property
    def is_off(self) -> bool:
        """Whether it never holds anything."""
        return not self._blocks_max

    def get(self, name: bytes) -> CachedBlock | None:
        """The block of a name; None: it is not here."""
        return self._blocks.get(name)

    def find(self, names: Sequence[bytes]) -> list[CachedBlock]:
        """The longest run of blocks, from the first name on, that is here: block 0, and each behind the one before it,
        whatever names somebody asks for."""
        run: list[CachedBlock] = []
        for name in names:
            block = self._blocks.get(name)
            if block is None or block.parent is not (run[-1] if run else None):
                break
            run.append(block)
        return run

    def hold(self, run: Sequence[CachedBlock]) -> Slabs:
        """Holds the slabs of a run that was found; the caller gives them back to the pools."""
        held, shared = Slabs(), Slabs()
        for block in run:
            for kind, slab in block.slabs:
                shared.of(kind).append(slab)
        self.pools.share(shared, held)
        return held

    def note_request(self, names: Sequence[bytes]) -> None:
        """Counts the use of the blocks of a sequence, whether they are here or not; to be told before room is made."""
        self._duel.request(names)
        for block in reversed(self.find(names)):
            self._blocks.move_to_end(block.name)

    def extend(self, run: list[CachedBlock], name: bytes, refs: Sequence[BlockRef]) -> bool:
        """Adds a sealed block behind a run, and to it.

        The caller holds the slabs of the run and of the block. Nothing happens, and False is returned, when the name is
        here already, when the run is no longer here, or when there is no room.
        """
        parent = run[-1] if run else None
        is_orphan = parent is not None and self._blocks.get(parent.name) is not parent
        if name in self._blocks or is_orphan or not self._may_grow():
            return False
        block = self._blocks[name] = CachedBlock(name, tuple(refs), parent)
        if parent is not None:
            parent.children[name] = block
        self._duel.came(name)
        for slab in block.slabs:
            self.pools.keep(*slab)
        run.append(block)
        self.on_added(block)
        return True

    def join(self, run: list[CachedBlock], name: bytes, held: Slabs) -> bool:
        """Lets a sequence that has a block of its own behind a run go on from the one that is here, and adds it to the
        run: its slabs take the places of the own ones, which are given back. Nothing happens, and False is returned,
        when the block is not here behind the run.

        Args:
            held: what the sequence holds.
        """
        block = self._blocks.get(name)
        if block is None or block.parent is not (run[-1] if run else None):
            return False
        own, shared = Slabs(), self.hold([block])
        for kind, slab in shared:
            place = len(run) if kind is SlabKind.BLOCK else 0
            own.of(kind).append(held.of(kind)[place])
            held.of(kind)[place] = slab
        self.pools.give_back(own)
        run.append(block)
        return True

    def extend_or_join(
        self, run: list[CachedBlock], names: Sequence[bytes], refs: Sequence[Sequence[BlockRef]], held: Slabs
    ) -> int:
        """Adds sealed blocks behind a run, one after the other; goes on from those that somebody else has put there
        meanwhile, and ends where neither is possible.

        Args:
            names: of the blocks, from the first behind the run on.
            held: slabs of the run and of the blocks, see `join`.

        Returns:
            How many were added.
        """
        added = 0
        for name, block_refs in zip(names, refs, strict=True):
            if self.extend(run, name, block_refs):
                added += 1
            elif not self.join(run, name, held):
                break
        return added

    def make_room(self, missing: Mapping[SlabKind, int]) -> None:
        """Evicts until so many slabs of each kind are free; no more are missing than are available."""
        victims = self._victims()
        while any(count > self.pools.free(kind) for kind, count in missing.items()):
            self._remove(next(victims))

    def discard(self, block: CachedBlock) -> list[CachedBlock]:
        """Takes out a block that is not what it should be, and all behind it. Who holds slabs of theirs goes on so.

        Returns what was taken out; nothing if the block is not here any more.
        """
        if self._blocks.get(block.name) is not block:
            return []
        out = _subtree(block)
        for one in reversed(out):
            self._remove(one)
        return out

    def _may_grow(self) -> bool:
        if len(self._blocks) < self._blocks_max:
            return True
        victim = next(self._victims(), None) if self._blocks_max else None
        if victim is not None:
            self._remove(victim)
        return victim is not None

    def _victims(self) -> Iterator[CachedBlock]:
        """Idle blocks, the least worthy first, and each after those behind it. The caller removes
        every one that it gets."""
        while (block := self._least_worthy()) is not None:
            yield from _from_the_end(block)

    def _least_worthy(self) -> CachedBlock | None:
        """An idle block: one that the better rule would not keep, or else the one that was not used for longest."""
        spare = (self._blocks[name] for name in self._duel.spare())
        return next((block for block in chain(spare, self._blocks.values()) if self._is_idle(block)), None)

    def _is_idle(self, block: CachedBlock) -> bool:
        return all(self.pools.is_idle(*slab) for slab in block.slabs)

    def _remove(self, block: CachedBlock) -> None:
        del self._blocks[block.name]
        self._duel.gone(block.name)
        if block.parent is not None:
            del block.parent.children[block.name]
        for slab in block.slabs:
            self.pools.give_up(*slab)
        self.on_removed(block)

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        for name, block in self._blocks.items():
            parent = block.parent
            if name != block.name or (parent and parent.children.get(name) is not block):
                raise AssertionError(f"block {name.hex()} is not where it should be")
            if parent and self._blocks.get(parent.name) is not parent:
                raise AssertionError(f"block {name.hex()} stands behind one that is gone")
            if parent and self._is_idle(parent) and not self._is_idle(block):
                raise AssertionError(f"block {name.hex()} is in use behind one that is not")
        spare = set(self._duel.spare())
        if spare != {name for name in self._blocks if not self._duel.keeps(name)}:
            raise AssertionError(f"{len(spare)} blocks are spare, which are not those that are not worth keeping")
        if len(self._blocks) > self._blocks_max:
            raise AssertionError(f"{len(self._blocks)} blocks are held, at most {self._blocks_max}")


def _subtree(block: CachedBlock) -> list[CachedBlock]:
    """A block and all behind it, each after the one before it."""
    found = [block]
    for one in found:
        found.extend(one.children.values())
    return found


def _from_the_end(block: CachedBlock) -> Iterator[CachedBlock]:
    """A block and all behind it, each after those behind it. The caller removes every one that it gets."""
    path = [block]
    while path:
        while path[-1].children:
            path.append(next(reversed(path[-1].children.values())))
        yield path.pop()
