"""What a chunk of a prompt has filled is sealed: blocks as they become full, the tail at the end. In the device's
thread."""

from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.seals import Seals
from zipserve.engine.cache import KvCache
from zipserve.prefill.prompt import Prompt
from zipserve.prefill.scheduler import Chunk, Job
from zipserve.v1.kv_pb2 import BlockRef


def seal_blocks(seals: Seals, chunk: Chunk[Prompt]) -> None:
    """Seals the blocks that a chunk has filled, and notes them in the prompt."""
    job, prompt = chunk.job, chunk.job.payload
    for block in range(len(prompt.sealed), (job.computed + chunk.tokens) // seals.layout.block_tokens):
        slabs = job.slabs.of_block(block)
        generations = [job.generations[slab] for slab in slabs]
        prompt.sealed.append(seals.seal_block(slabs, generations, block, prompt.names[block]))


def seal_tail(seals: Seals, cache: KvCache, job: Job[Prompt]) -> list[BlockRef]:
    """Packs and seals what follows the last block, if anything does.

    Raises:
        KvValueError: a key or value cannot be coded.
    """
    rest = job.tokens % seals.layout.block_tokens
    if not rest:
        return []
    slab = job.slabs.tails[0]
    cache.pack_tail(job.slot, rest, slab)
    generation = job.generations[SlabKind.TAIL, slab]
    return [seals.seal(SlabKind.TAIL, slab, generation, job.tokens - rest, rest, job.payload.names[-1])]
