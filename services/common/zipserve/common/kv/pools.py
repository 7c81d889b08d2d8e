"""All slabs of one worker: how many of each kind a sequence needs, and who holds which. Pure."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from zipserve.common.kv.allocator import SlabAllocator
from zipserve.common.kv.layout import Layout, SlabKind


@dataclass
class Slabs:
    """What one sequence holds."""

    sinks: list[int] = field(default_factory=list)
    """One slab, beside block 0, if the codec has sinks and the sequence a block."""
    blocks: list[int] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)
    """One slab if the sequence does not end at a block's end."""

    def of(self, kind: SlabKind) -> list[int]:
        """Slabs of a kind; changes to the list change what is held."""
        return {SlabKind.SINKS: self.sinks, SlabKind.BLOCK: self.blocks, SlabKind.TAIL: self.tails}[kind]

    def of_block(self, block: int) -> list[tuple[SlabKind, int]]:
        """Kind and number of the slabs of a block: of block 0 the sinks first, if there are any."""
        return [*((SlabKind.SINKS, slab) for slab in self.sinks if not block), (SlabKind.BLOCK, self.blocks[block])]

    def __iter__(self) -> Iterator[tuple[SlabKind, int]]:
        """Kind and number of each slab, in the order in which a handle lists them: sinks, blocks, tail."""
        for kind in (SlabKind.SINKS, SlabKind.BLOCK, SlabKind.TAIL):
            for slab in self.of(kind):
                yield kind, slab


def _ignore(kind: SlabKind, slab: int) -> None:
    """Slabs that nobody reads from outside need no treatment when they become free."""


def _nothing_is_kept(missing: Mapping[SlabKind, int]) -> None:
    """Where no slab is kept for others to find, none can be given up."""


class SlabPools:
    """One allocator for each kind of slab. Not thread-safe: one thread owns it."""

    def __init__(self, layout: Layout, *, blocks: int, tails: int, sinks: int) -> None:
        self._layout = layout
        self.blocks = SlabAllocator(blocks)
        self.tails = SlabAllocator(tails, "tail slabs")
        self.sinks = SlabAllocator(sinks if layout.has_sinks else 0, "sinks slabs")
        self._pools = {SlabKind.SINKS: self.sinks, SlabKind.BLOCK: self.blocks, SlabKind.TAIL: self.tails}
        self.on_free: Callable[[SlabKind, int], None] = _ignore
        """Called with every slab that becomes free, before anybody can take it again."""
        self.on_short: Callable[[Mapping[SlabKind, int]], None] = _nothing_is_kept
        """Called when fewer slabs are free than are needed, though as many are available: gives up kept ones."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self._layout.block_tokens

    def sealed_blocks(self, tokens: int) -> int:
        """Full blocks of a sequence of `tokens` tokens."""
        return tokens // self._layout.block_tokens

    def try_take(self, tokens: int, tail_of: int) -> Slabs | None:
        """Takes all that a sequence needs to grow to `tokens` tokens, or nothing: None.

        Args:
            tail_of: its length at the handoff; a tail slab is needed unless that is a block's end.
        """
        slabs = Slabs()
        return slabs if self.try_extend(slabs, tokens, tail_of) else None

    def try_extend(self, slabs: Slabs, tokens: int, tail_of: int = 0) -> bool:
        """Adds to what a sequence holds all that it needs for `tokens` tokens, or nothing; whether it has that now."""
        missing = self.missing(slabs, tokens, tail_of)
        if not self.can_have(missing):
            return False
        if any(count > self._pools[kind].free for kind, count in missing.items()):
            self.on_short(missing)
        for kind, count in missing.items():
            slabs.of(kind).extend(self._pools[kind].take(count))
        return True

    def missing(self, slabs: Slabs, tokens: int, tail_of: int = 0) -> dict[SlabKind, int]:
        """What a sequence needs for `tokens` tokens beyond what it holds, by kind."""
        blocks = self.sealed_blocks(tokens)
        needed = {
            SlabKind.SINKS: int(self._layout.has_sinks and blocks > 0),
            SlabKind.BLOCK: blocks,
            SlabKind.TAIL: int(tail_of % self._layout.block_tokens > 0),
        }
        return {kind: max(0, count - len(slabs.of(kind))) for kind, count in needed.items()}

    def of(self, kind: SlabKind) -> SlabAllocator:
        """Who holds which slabs of a kind."""
        return self._pools[kind]

    def free(self, kind: SlabKind) -> int:
        """Slabs of a kind that nobody holds."""
        return self._pools[kind].free

    def available(self, kind: SlabKind) -> int:
        """Slabs of a kind that are free, or would be if those that are only kept were given up."""
        return self._pools[kind].free + self._pools[kind].idle

    def can_have(self, missing: Mapping[SlabKind, int]) -> bool:
        """Whether so many slabs of each kind are available."""
        return all(count <= self.available(kind) for kind, count in missing.items())

    def generation(self, kind: SlabKind, slab: int) -> int:
        """Generation of a slab that is held."""
        return self._pools[kind].generation(slab)

    def share(self, slabs: Slabs, other: Slabs) -> None:
        """Adds all that a sequence holds to what another one holds, which goes on from the same tokens."""
        for kind, pool in self._pools.items():
            pool.share(slabs.of(kind))
            other.of(kind).extend(slabs.of(kind))

    def keep(self, kind: SlabKind, slab: int) -> None:
        """Holds a slab once more, until it is given up because others need slabs."""
        self._pools[kind].keep(slab)

    def give_up(self, kind: SlabKind, slab: int) -> None:
        """Ends a `keep`."""
        self._note_free(kind, self._pools[kind].give_up(slab))

    def is_idle(self, kind: SlabKind, slab: int) -> bool:
        """Whether a slab is kept, and nobody else holds it."""
        return self._pools[kind].is_idle(slab)

    def give_back(self, slabs: Slabs) -> None:
        """Gives back slabs that are held, and forgets them in `slabs`, so that nothing is freed twice."""
        for kind, pool in self._pools.items():
            self._note_free(kind, pool.give_back(slabs.of(kind)))
            slabs.of(kind).clear()

    def give_back_tail(self, slabs: Slabs) -> bool:
        """Frees the tail slab, once it is unpacked; whether there was one."""
        had = bool(slabs.tails)
        self._note_free(SlabKind.TAIL, self.tails.give_back(slabs.tails))
        slabs.tails.clear()
        return had

    def levels(self) -> dict[str, int]:
        """The fields of zipserve.v1.Load that tell how full the pools are."""
        named = ((SlabKind.BLOCK, "blocks"), (SlabKind.TAIL, "tails"), (SlabKind.SINKS, "sinks"))
        totals = {f"total_{name}": self._pools[kind].count for kind, name in named}
        return {**totals, **{f"free_{name}": self.available(kind) for kind, name in named}}

    def check_integrity(self) -> None:
        """Asserts that the books balance."""
        for pool in self._pools.values():
            pool.check_integrity()

    def _note_free(self, kind: SlabKind, slabs: list[int]) -> None:
        for slab in slabs:
            self.on_free(kind, slab)
