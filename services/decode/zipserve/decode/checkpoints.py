"""What a decode worker lets others find: the blocks that it has pulled, and those that its sequences fill.

So the next turn of a chat reuses the answer of the last one, and a sequence whose worker has died is computed again
from its last full block on.
"""

import asyncio
from collections.abc import Iterator

from zipserve.common import log
from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.header import SHORT_HASH_BYTES
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.prefix import PrefixChain
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.kv.seals import Seals
from zipserve.common.metrics import Metrics
from zipserve.common.threads import in_thread
from zipserve.decode.stream import Filling, Stream
from zipserve.v1 import kv_pb2

_log = log.get()


class Checkpoints:
    """Of one worker. Lives in the event loop, but for `seal`."""

    def __init__(self, index: PrefixIndex, seals: Seals, metrics: Metrics) -> None:
        self._index = index
        self._seals = seals
        self._metrics = metrics

    async def are_sound(self, stream: Stream) -> bool:
        """Whether the blocks that a sequence has found are what they were when they were sealed. One that is not leaves
        the index, with all behind it."""
        unsound = await asyncio.to_thread(self._seals.first_unsound, list(stream.ticket.run))
        if unsound is not None:
            self._metrics.handoff_failures.labels(unsound.error.reason).inc()
            _log.error("block.unsound", reason=unsound.error.reason, error=unsound.error.message)
            self._index.discard(unsound.block)
            return False
        found, wanted = len(stream.ticket.run), len(stream.ticket.names)
        self._metrics.prefix_blocks.labels("hit").inc(found)
        self._metrics.prefix_blocks.labels("miss").inc(wanted - found)
        return True

    async def share_pulled(self, stream: Stream, tokens: int) -> None:
        """Seals what was pulled for a sequence of so many tokens as our own, and puts it into the index."""
        chain, ticket = stream.continuation.chain, stream.ticket
        if chain is None:
            return
        blocks = range(len(ticket.run), tokens // self._seals.layout.block_tokens)
        filled = [self._filling(stream, block, chain.names[block]) for block in blocks]
        await in_thread(self._seal_all, stream, filled)
        self.publish(stream)

    def plan(self, stream: Stream, tokens: int) -> None:
        """Notes which blocks will be full when the next `tokens` tokens of a sequence are computed."""
        chain, start = stream.continuation.chain, stream.sequence.length
        if chain is None:
            return
        if start + tokens > chain.tokens:
            chain.extend([stream.next_input])
        block_tokens = self._seals.layout.block_tokens
        blocks = range(start // block_tokens, (start + tokens) // block_tokens)
        stream.filling = [self._filling(stream, block, chain.names[block]) for block in blocks]

    def seal(self, stream: Stream) -> None:
        """Seals the planned blocks, after the step. In the device's thread."""
        self._seal_all(stream, stream.filling)
        stream.filling = []

    def publish(self, stream: Stream) -> None:
        """Lets others find what was sealed, as long as all before it is found here in the sequence's own slabs.

        Sequences that begin alike may come at once, each with all of its blocks. Those of the first are then those of
        the others too, so that what these generate is found as well. They were not there when the others looked for
        them, and so are as new as their own, and were verified as lately.
        """
        ticket, run = stream.ticket, stream.ticket.run
        for block, name, refs in stream.sealed:
            if block == len(run) and not self._index.extend(run, name, refs) and block < len(ticket.names):
                self._index.join(run, name, ticket.slabs)
        stream.sealed = []

    def _filling(self, stream: Stream, block: int, name: bytes) -> Filling:
        slabs = stream.ticket.slabs.of_block(block)
        return Filling(slabs, [self._index.pools.generation(*slab) for slab in slabs], block, name)

    def _seal_all(self, stream: Stream, filled: list[Filling]) -> None:
        for slabs, generations, block, name in filled:
            stream.sealed.append((block, name, self._seals.seal_block(slabs, generations, block, name)))


def local_slabs(claims: kv_pb2.KvClaims, stream: Stream) -> list[int | None]:
    """Where the slabs of a handle are to be read to; None for those that the sequence has found here."""
    slabs, blocks = stream.ticket.slabs, len(stream.ticket.run)
    found = {SlabKind.SINKS: min(blocks, 1), SlabKind.BLOCK: blocks, SlabKind.TAIL: 0}
    places: dict[SlabKind, Iterator[int | None]] = {
        kind: iter([*[None] * count, *slabs.of(kind)[count:]]) for kind, count in found.items()
    }
    return [next(places[SlabKind(ref.kind)]) for ref in claims.refs]


def check_chain(claims: kv_pb2.KvClaims, chain: PrefixChain | None) -> None:
    """Asserts that a handle is of the tokens that a chain names: other names would be found by others.

    Raises:
        InvalidRequestError: it is not.
    """
    if chain is None:
        return
    names = chain.slab_names()
    if chain.tokens != claims.tokens:
        raise InvalidRequestError(
            f"there are {chain.tokens} past tokens, the handle is of {claims.tokens}", field="past_token_ids"
        )
    blocks = [ref for ref in claims.refs if ref.kind != kv_pb2.SLAB_KIND_SINKS]
    if any(ref.prefix_hash != name[:SHORT_HASH_BYTES] for ref, name in zip(blocks, names, strict=True)):
        raise InvalidRequestError("the past tokens are not those of the handle", field="past_token_ids")
