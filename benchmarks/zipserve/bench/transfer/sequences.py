"""Sequences of sealed slabs, laid out alike in the arenas of both processes: a number names the slabs of one."""

import hashlib
from dataclasses import dataclass
from math import inf

import torch

from zipserve.common.kv.header import SlabIdentity, seal, verify
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.refs import identity_of, ref_of
from zipserve.common.transport import ArenaInfo
from zipserve.engine.codec.arenas import Arenas
from zipserve.v1.kv_pb2 import BlockRef

INCARNATION = 1


@dataclass(frozen=True)
class Capacity:
    """Slabs of the arenas of one process, of which only one sequence at a time may have a tail."""

    blocks: int

    def slabs(self, layout: Layout, kind: SlabKind) -> int:
        """How many there are of a kind; a sequence of one block has sinks of its own."""
        return 0 if kind not in layout.kinds() else 1 if kind is SlabKind.TAIL else self.blocks

    def sequences(self, layout: Layout, tokens: int) -> int:
        """How many sequences of `tokens` tokens fit, in slabs of their own."""
        kinds = [kind for kind, _, _ in layout.slabs_of(tokens)]
        return int(min((self.slabs(layout, kind) // kinds.count(kind) for kind in set(kinds)), default=inf))


def slabs_of(layout: Layout, tokens: int, sequence: int) -> list[int]:
    """Numbers of the slabs of one sequence, in the order in which a handle lists them."""
    kinds = [kind for kind, _, _ in layout.slabs_of(tokens)]
    return [sequence * kinds.count(kind) + kinds[:place].count(kind) for place, kind in enumerate(kinds)]


class Memory:
    """The arenas of one process, filled with random bytes: what a slab holds matters to nobody here."""

    def __init__(self, layout: Layout, capacity: Capacity, seed: int) -> None:
        self.layout = layout
        self._arenas = Arenas.allocate(
            layout,
            blocks=capacity.slabs(layout, SlabKind.BLOCK),
            tails=capacity.slabs(layout, SlabKind.TAIL),
            sinks=capacity.slabs(layout, SlabKind.SINKS),
        )
        generator = torch.Generator().manual_seed(seed)
        for kind in layout.kinds():
            self._arenas.of(kind).random_(0, 256, generator=generator)
        self.infos = [
            ArenaInfo(kind, arena.data_ptr(), arena.shape[1], arena.shape[0], "DRAM")
            for kind in layout.kinds()
            for arena in (self._arenas.of(kind),)
        ]

    def view(self, kind: SlabKind, slab: int) -> memoryview:
        """The bytes of a slab."""
        return memoryview(self._arenas.of(kind)[slab].numpy())  # type: ignore[arg-type]  # arrays are buffers

    def seal(self, tokens: int, sequence: int) -> list[BlockRef]:
        """Seals the slabs of a sequence; the references to them, as a handle lists them."""
        layout, refs = self.layout, []
        for (kind, position, held), slab in zip(
            layout.slabs_of(tokens), slabs_of(layout, tokens, sequence), strict=True
        ):
            identity = SlabIdentity(
                kind=kind,
                fingerprint=layout.fingerprint,
                incarnation=INCARNATION,
                generation=1,
                start_position=position,
                tokens=held,
                payload_bytes=layout.payload_bytes(kind, held),
                prefix_hash=hashlib.sha256(f"{sequence} {position}".encode()).digest(),
            )
            refs.append(ref_of(identity, slab, seal(self.view(kind, slab), identity)))
        return refs

    def verify(self, refs: list[BlockRef]) -> None:
        """Checks that slabs with the numbers of the references hold what these name.

        Raises:
            HandoffError: one does not.
        """
        for ref in refs:
            expected = identity_of(ref, self.layout.fingerprint, INCARNATION)
            verify(self.view(SlabKind(ref.kind), ref.slab)[: ref.bytes], expected, ref.checksum)

    def clear(self) -> None:
        """Makes sure that no slab is still what it was."""
        for kind in self.layout.kinds():
            self._arenas.of(kind).zero_()
