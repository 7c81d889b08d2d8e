"""The side that shares blocks: whoever asks by name gets a lease over the longest run that is here."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from zipserve.common import log
from zipserve.common.errors import InvalidRequestError, LayoutMismatchError
from zipserve.common.kv.handle import LEASE_ID_BYTES
from zipserve.common.kv.pools import Slabs
from zipserve.common.kv.prefix import HASH_BYTES
from zipserve.common.kv.prefix_index import CachedBlock, PrefixIndex
from zipserve.common.kv.seals import Seals
from zipserve.common.metrics import Metrics
from zipserve.common.rpc import Context
from zipserve.common.transfer.source import KvSource
from zipserve.v1 import kv_store_service_pb2, kv_store_service_pb2_grpc

_log = log.get()
NAMES_MAX = 65_536


class Shelf(Protocol):
    """Blocks that can be leased."""

    index: PrefixIndex
    seals: Seals

    def count(self, names: Sequence[bytes]) -> int:
        """Blocks of a sequence, from the first on, that are here in any form."""

    def entries(self) -> Iterable[tuple[bytes, bytes]]:
        """Name of every block that is here in any form, and of the one before it (empty: none), which comes first."""

    def watch(self, added: Callable[[bytes, bytes], None], removed: Callable[[bytes], None]) -> None:
        """Says who is to be told of blocks (name, and that of the one before it) that come, and of those that go."""

    async def bring(self, names: Sequence[bytes]) -> None:
        """Puts as many of them as possible into the index, those that are here in another form."""


class IndexShelf:
    """A `Shelf` that is an index and nothing else."""

    def __init__(self, index: PrefixIndex, seals: Seals) -> None:
        self.index = index
        self.seals = seals

    def count(self, names: Sequence[bytes]) -> int:
        return len(self.index.find(names))

    def entries(self) -> Iterable[tuple[bytes, bytes]]:
        return self.index.entries()

    def watch(self, added: Callable[[bytes, bytes], None], removed: Callable[[bytes], None]) -> None:
        self.index.on_added = lambda block: added(block.name, block.parent.name if block.parent else b"")
        self.index.on_removed = lambda block: removed(block.name)

    async def bring(self, names: Sequence[bytes]) -> None:
        """All are there."""


class BlockSharing(kv_store_service_pb2_grpc.KvStoreServiceServicer):
    """KvStoreService of one holder. Lives in the event loop. Before it has a shelf, it holds nothing."""

    def __init__(self, source: KvSource, metrics: Metrics) -> None:
        self._source = source
        self._metrics = metrics
        self._shelf: Shelf | None = None
        self.draining = False
        """Whether no new lease is given."""

    def attach(self, shelf: Shelf) -> None:
        """Says what there is."""
        self._shelf = shelf

    async def Lookup(
        self, request: kv_store_service_pb2.LookupRequest, context: Context
    ) -> kv_store_service_pb2.LookupResponse:
        names = self._checked(request.layout_fingerprint, request.prefix_hashes)
        return kv_store_service_pb2.LookupResponse(blocks=self._shelf.count(names) if self._shelf else 0)

    async def Pin(self, request: kv_store_service_pb2.PinRequest, context: Context) -> kv_store_service_pb2.PinResponse:
        names = self._checked(request.layout_fingerprint, request.prefix_hashes)
        if self._shelf is None or self.draining:
            return kv_store_service_pb2.PinResponse()
        await self._shelf.bring(names)
        run, held = await self._sound(self._shelf, names)
        if not run:
            return kv_store_service_pb2.PinResponse()
        refs = [ref for block in run for ref in block.refs]
        handle = self._source.issue(refs, len(run) * self._shelf.seals.layout.block_tokens, held)
        return kv_store_service_pb2.PinResponse(blocks=len(run), handle=handle)

    async def Release(
        self, request: kv_store_service_pb2.ReleaseRequest, context: Context
    ) -> kv_store_service_pb2.ReleaseResponse:
        if len(request.lease_id) != LEASE_ID_BYTES:
            raise InvalidRequestError(
                f"the lease id has {len(request.lease_id)} bytes, must have {LEASE_ID_BYTES}", field="lease_id"
            )
        self._source.release(request.lease_id)
        return kv_store_service_pb2.ReleaseResponse()

    async def _sound(self, shelf: Shelf, names: Sequence[bytes]) -> tuple[list[CachedBlock], Slabs]:
        """The longest run that is what it was when it was sealed, held. What is not leaves the index."""
        index = shelf.index
        while run := index.find(names):
            held = index.hold(run)
            try:
                unsound = await asyncio.to_thread(shelf.seals.first_unsound, run)
            except BaseException:
                self._source.on_free(held)
                raise
            if unsound is None:
                index.note_request(names)
                return run, held
            self._source.on_free(held)
            self._metrics.handoff_failures.labels(unsound.error.reason).inc()
            _log.error("block.unsound", reason=unsound.error.reason, error=unsound.error.message)
            index.discard(unsound.block)
        return [], Slabs()

    def _checked(self, fingerprint: bytes, names: Sequence[bytes]) -> Sequence[bytes]:
        if len(fingerprint) != HASH_BYTES:
            raise InvalidRequestError(
                f"the fingerprint has {len(fingerprint)} bytes, must have {HASH_BYTES}", field="layout_fingerprint"
            )
        if len(names) > NAMES_MAX:
            raise InvalidRequestError(f"{len(names)} hashes were given, at most {NAMES_MAX}", field="prefix_hashes")
        odd = next((name for name in names if len(name) != HASH_BYTES), None)
        if odd is not None:
            raise InvalidRequestError(f"a hash has {len(odd)} bytes, must have {HASH_BYTES}", field="prefix_hashes")
        if self._shelf is not None and fingerprint != self._shelf.seals.layout.fingerprint:
            layout = self._shelf.seals.layout
            raise LayoutMismatchError(
                f"blocks of layout {fingerprint.hex()[:16]} are asked for, here are those of "
                f"{layout.fingerprint.hex()[:16]} ({layout.description})"
            )
        return names
