"""Headers of the slabs that prompts fill: written when a slab is full, checked before others build on it."""

from collections.abc import Sequence
from typing import NamedTuple

from zipserve.common.errors import HandoffError
from zipserve.common.kv import header
from zipserve.common.kv.header import SlabIdentity
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.prefix_index import CachedBlock
from zipserve.common.kv.refs import identity_of, ref_of
from zipserve.engine.device import Device
from zipserve.prefill.prompt import Prompt
from zipserve.prefill.scheduler import Chunk, Job
from zipserve.v1.kv_pb2 import BlockRef


class Unsound(NamedTuple):
    """A cached block that is not what it was when it was sealed."""

    block: CachedBlock
    error: HandoffError


class Sealer:
    """Of one device, in whose thread all but `poison` runs."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def seal_blocks(self, chunk: Chunk[Prompt]) -> None:
        """Seals the blocks that a chunk has filled, and notes them in the prompt."""
        job, prompt, layout = chunk.job, chunk.job.payload, self._device.layout
        for block in range(len(prompt.sealed), (job.computed + chunk.tokens) // layout.block_tokens):
            slabs = [(SlabKind.SINKS, slab) for slab in job.slabs.sinks if not block]
            slabs.append((SlabKind.BLOCK, job.slabs.blocks[block]))
            position, name = block * layout.block_tokens, prompt.names[block]
            refs = [self._seal(job, *slab, position, layout.tokens_of(slab[0]), name) for slab in slabs]
            prompt.sealed.append(tuple(refs))

    def seal_tail(self, job: Job[Prompt]) -> list[BlockRef]:
        """Packs and seals what follows the last block, if anything does.

        Raises:
            KvValueError: a key or value cannot be coded.
        """
        rest = job.tokens % self._device.layout.block_tokens
        if not rest:
            return []
        slab = job.slabs.tails[0]
        self._device.cache.pack_tail(job.slot, rest, slab)
        return [self._seal(job, SlabKind.TAIL, slab, job.tokens - rest, rest, job.payload.names[-1])]

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
        header.poison(self._device.slab_view(kind, slab))

    def _seal(self, job: Job[Prompt], kind: SlabKind, slab: int, position: int, tokens: int, name: bytes) -> BlockRef:
        layout = self._device.layout
        identity = SlabIdentity(
            kind=kind,
            fingerprint=layout.fingerprint,
            incarnation=self._device.incarnation,
            generation=job.generations[kind, slab],
            start_position=position,
            tokens=tokens,
            payload_bytes=layout.payload_bytes(kind, tokens),
            prefix_hash=name,
        )
        return ref_of(identity, slab, header.seal(self._device.slab_view(kind, slab), identity))

    def _check(self, ref: BlockRef) -> None:
        view = self._device.slab_view(SlabKind(ref.kind), ref.slab)[: ref.bytes]
        header.verify(view, identity_of(ref, self._device.layout.fingerprint, self._device.incarnation), ref.checksum)
