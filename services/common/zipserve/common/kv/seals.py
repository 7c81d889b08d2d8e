"""Headers of the slabs of one holder: written when a slab is complete, checked before anybody builds on it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from zipserve.common.errors import HandoffError
from zipserve.common.kv import header
from zipserve.common.kv.header import SlabIdentity
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.prefix_index import CachedBlock
from zipserve.common.kv.refs import identity_of, ref_of
from zipserve.v1.kv_pb2 import BlockRef


class Unsound(NamedTuple):
    """A cached block that is not what it was when it was sealed."""

    block: CachedBlock
    error: HandoffError


class Seals:
    """Of one incarnation of one holder. Touches slabs only, so that any thread may use it that owns the slab.

    Args:
        slab_view: the bytes of a slab in host memory.
    """

    def __init__(self, layout: Layout, incarnation: int, slab_view: Callable[[SlabKind, int], memoryview]) -> None:
        self.layout = layout
        self._incarnation = incarnation
        self.slab_view = slab_view

    def seal(self, kind: SlabKind, slab: int, generation: int, position: int, tokens: int, name: bytes) -> BlockRef:
        """Writes the header of a slab whose payload is complete.

        Args:
            generation: of the slab.
            position: of its first token.
            name: chained hash of all tokens up to its end.
        """
        identity = SlabIdentity(
            kind=kind,
            fingerprint=self.layout.fingerprint,
            incarnation=self._incarnation,
            generation=generation,
            start_position=position,
            tokens=tokens,
            payload_bytes=self.layout.payload_bytes(kind, tokens),
            prefix_hash=name,
        )
        return ref_of(identity, slab, header.seal(self.slab_view(kind, slab), identity))

    def seal_block(
        self, slabs: Sequence[tuple[SlabKind, int]], generations: Sequence[int], block: int, name: bytes
    ) -> tuple[BlockRef, ...]:
        """Seals block number `block` of a sequence, and the sinks beside it if there are any.

        Args:
            slabs: the sinks first.
            generations: of the slabs.
        """
        position = block * self.layout.block_tokens
        return tuple(
            self.seal(kind, slab, generation, position, self.layout.tokens_of(kind), name)
            for (kind, slab), generation in zip(slabs, generations, strict=True)
        )

    def first_unsound(self, run: Sequence[CachedBlock]) -> Unsound | None:
        """Checks that blocks still are what they were when they were sealed; returns the first that is not."""
        for block in run:
            try:
                for ref in block.refs:
                    self._check(ref)
            except HandoffError as error:
                return Unsound(block, error)
        return None

    def poison(self, kind: SlabKind, slab: int) -> None:
        """Marks a slab that is free, so that a late reader notices."""
        header.poison(self.slab_view(kind, slab))

    def _check(self, ref: BlockRef) -> None:
        view = self.slab_view(SlabKind(ref.kind), ref.slab)[: ref.bytes]
        header.verify(view, identity_of(ref, self.layout.fingerprint, self._incarnation), ref.checksum)
