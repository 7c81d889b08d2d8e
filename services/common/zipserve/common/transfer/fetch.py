"""Brings blocks that other workers hold into the own index: once for all who need them at the same time."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from opentelemetry.trace import Span

from zipserve.common import log, tracing
from zipserve.common.errors import BlockSwappedError, ZipserveError
from zipserve.common.kv.header import SHORT_HASH_BYTES
from zipserve.common.kv.holders import HolderKey, Holders
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.pools import Slabs
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.kv.seals import Seals
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.status import client_errors
from zipserve.common.threads import in_thread
from zipserve.common.transfer.held_lease import HeldLease
from zipserve.common.transfer.puller import KvPuller
from zipserve.v1 import kv_pb2, kv_store_service_pb2

_log = log.get()
_AVOIDED_S = {"failed": 5.0, "missed": 0.5}
"""How long a holder is left alone that does not answer as it should, or that has less than the directory tells."""


class _Fetch(NamedTuple):
    task: "asyncio.Task[None]"
    span: Span
    """In the trace of the request that came first; those of others have links to it."""


class PrefixFetcher:
    """Of one holder of blocks. Lives in the event loop.

    Args:
        myself: under which name the own blocks are in `holders`.
        give_back: takes back slabs that were held for a fetch; others may wait for them.
        time_s: longest time that somebody waits for a fetch: blocks that come later had better be computed.
        fetches_max: at the same time.
    """

    def __init__(
        self,
        *,
        myself: HolderKey,
        index: PrefixIndex,
        seals: Seals,
        puller: KvPuller,
        give_back: Callable[[Slabs], None],
        holders: Holders,
        metrics: Metrics,
        time_s: float,
        fetches_max: int = 4,
    ) -> None:
        self._myself = myself
        self._index = index
        self._seals = seals
        self._puller = puller
        self._give_back = give_back
        self._holders = holders
        self._metrics = metrics
        self._time_s = time_s
        self._turns = asyncio.Semaphore(fetches_max)
        self._coming: dict[bytes, _Fetch] = {}
        """Blocks that are being fetched."""
        self._avoided: dict[HolderKey, float] = {}
        """Until when."""

    async def fetch(self, names: Sequence[bytes], deadline: Deadline, request_id: str) -> None:
        """Brings as many of the leading blocks of a sequence here as somebody has. What cannot be had in time is no
        error: it is to be computed, for which half of the time is left.
        """
        now_s = time.monotonic()
        give_up_s = now_s + min((deadline.at_s - now_s) / 2, self._time_s)
        while (left_s := give_up_s - time.monotonic()) > 0:
            found = len(self._index.find(names))
            if found == len(names):
                return
            fetch = self._coming.get(names[found])
            if fetch is not None:
                tracing.link(fetch.span)
            else:
                fetch = self._start(names, found, request_id)
            if fetch is None:
                return
            await asyncio.wait({fetch.task}, timeout=left_s)  # it goes on without us: others may wait for it too

    async def close(self) -> None:
        """Ends all fetches."""
        fetches = {fetch.task for fetch in self._coming.values()}
        for fetching in fetches:
            fetching.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)

    def _start(self, names: Sequence[bytes], found: int, request_id: str) -> _Fetch | None:
        """Fetches what is missing from whoever has most of it; None: nobody has more."""
        holder, blocks = self._best(names, found)
        if holder is None:
            return None
        coming = [name for name in names[found:blocks] if name not in self._coming]
        span = tracing.start("kv.fetch", attributes={"zipserve.peer": holder[0]})
        task = asyncio.create_task(self._fetch_from(holder, names[:blocks], request_id, span), name="prefix-fetch")
        fetch = _Fetch(task, span)
        self._coming.update(dict.fromkeys(coming, fetch))

        def forget(_: object) -> None:
            span.end()
            for name in coming:
                del self._coming[name]

        task.add_done_callback(forget)
        return fetch

    async def _fetch_from(self, holder: HolderKey, names: Sequence[bytes], request_id: str, span: Span) -> None:
        started_s = time.monotonic()
        fetched, outcome = 0, "failed"
        try:
            async with self._turns:
                with tracing.using(span):
                    fetched = await self._read(holder, names, Deadline(self._time_s), request_id)
            outcome = "fetched" if fetched else "missed"
        except ZipserveError as error:
            tracing.fail(span, error)
            _log.warning("prefix.not_fetched", peer=holder[0], reason=error.reason, error=error.message)
        except Exception as error:  # noqa: BLE001  # a prompt can do without it
            tracing.fail(span, error)
            _log.exception("prefix.not_fetched", peer=holder[0])
        if not fetched:
            self._avoided[holder] = time.monotonic() + _AVOIDED_S[outcome]
        tracing.annotate("zipserve.kv.found", lambda: outcome, span)
        tracing.annotate("zipserve.kv.blocks", lambda: fetched, span)
        self._metrics.prefix_fetches.labels(outcome).inc()
        self._metrics.prefix_blocks_fetched.inc(fetched)
        _log.debug("prefix.fetched", peer=holder[0], blocks=fetched, seconds=round(time.monotonic() - started_s, 4))

    def _best(self, names: Sequence[bytes], found: int) -> tuple[HolderKey | None, int]:
        """Who has the longest run, and how many blocks that is; the first by name of those with the same."""
        now_s = time.monotonic()
        self._avoided = {holder: until_s for holder, until_s in self._avoided.items() if until_s > now_s}
        runs = {
            holder: run
            for holder, run in self._holders.runs(names).items()
            if run > found and holder != self._myself and holder not in self._avoided
        }
        best = min(runs, key=lambda holder: (-runs[holder], holder), default=None)
        return best, runs[best] if best else 0

    async def _read(self, holder: HolderKey, names: Sequence[bytes], deadline: Deadline, request_id: str) -> int:
        """Reads the blocks that are missing here, as far as there is room; returns how many there are more now."""
        stub = await self._puller.store_stub(*holder)
        request = kv_store_service_pb2.PinRequest(
            layout_fingerprint=self._seals.layout.fingerprint, prefix_hashes=names
        )
        with client_errors():
            timeout_s = deadline.remaining_s(self._time_s)
            pinned = await stub.Pin(request, timeout=timeout_s, metadata=tracing.outgoing(request_id))
        if not pinned.blocks:
            return 0
        claims = self._puller.open(pinned.handle)
        async with self._puller.lease(claims, request_id) as lease:
            self._check(claims, names)
            # as many as the handle has, whatever else the holder tells: only these are read
            return await self._pull(lease, claims, names[: claims.tokens // self._index.pools.block_tokens], deadline)

    def _check(self, claims: kv_pb2.KvClaims, names: Sequence[bytes]) -> None:
        """Asserts that what is offered is what was asked for."""
        for ref in claims.refs:
            block = ref.start_position // self._seals.layout.block_tokens
            if block >= len(names) or ref.prefix_hash != names[block][:SHORT_HASH_BYTES]:
                raise BlockSwappedError(f"{claims.worker_id} offers another block {block} than was asked for")

    async def _pull(self, lease: HeldLease, claims: kv_pb2.KvClaims, names: Sequence[bytes], deadline: Deadline) -> int:
        pools = self._index.pools
        run = self._index.find(names)
        held, first = self._index.hold(run), len(run)
        names = names[: first + pools.available(SlabKind.BLOCK)]
        try:
            if not pools.try_extend(held, len(names) * pools.block_tokens):
                return 0
            wanted = [_local(ref, held, first, pools.block_tokens) for ref in claims.refs]
            await lease.pull(wanted, deadline)
            refs = await in_thread(self._sealed, held, names, first)
            self._index.extend_or_join(run, names[first:], refs, held)
            return len(run) - first
        finally:
            self._give_back(held)

    def _sealed(self, held: Slabs, names: Sequence[bytes], first: int) -> list[tuple[kv_pb2.BlockRef, ...]]:
        """Seals what was read as our own: its bytes are those of its issuer, its header is not."""
        sealed = []
        for block in range(first, len(names)):
            slabs = held.of_block(block)
            generations = [self._index.pools.generation(*slab) for slab in slabs]
            sealed.append(self._seals.seal_block(slabs, generations, block, names[block]))
        return sealed


def _local(ref: kv_pb2.BlockRef, held: Slabs, first: int, block_tokens: int) -> int | None:
    """The slab for a reference; None for blocks before the first that is missing, and for those without room."""
    block = ref.start_position // block_tokens
    if not first <= block < len(held.blocks):
        return None
    return held.sinks[0] if ref.kind == kv_pb2.SLAB_KIND_SINKS else held.blocks[block]
