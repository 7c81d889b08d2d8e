"""The side that reads: opens handles, keeps their leases alive, reads the slabs and believes nothing unverified."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import grpc
from redis.exceptions import RedisError

from zipserve.common import log, tracing
from zipserve.common.errors import (
    BlockStaleError,
    BlockSwappedError,
    DeadlineError,
    HandoffError,
    IncarnationError,
    LayoutMismatchError,
    TransferError,
    WorkerLostError,
    ZipserveError,
)
from zipserve.common.kv import handle as handles
from zipserve.common.kv.header import generation_of, verify
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.refs import identity_of
from zipserve.common.metrics import Metrics
from zipserve.common.registry import RegistryView, WorkerRecord
from zipserve.common.rpc.channel import ChannelPool, Deadline
from zipserve.common.rpc.status import client_errors
from zipserve.common.transfer.held_lease import HeldLease
from zipserve.common.transport import ArenaInfo, Range, Transport
from zipserve.v1 import (
    kv_pb2,
    kv_store_service_pb2_grpc,
    kv_transfer_service_pb2,
    kv_transfer_service_pb2_grpc,
)
from zipserve.v1.worker_service_pb2 import WorkerRole

_log = log.get()
_RPC_TIMEOUT_S = 5.0
_SETTLE_TIMEOUT_S = 5.0
_KINDS = {kind.value for kind in SlabKind}


@dataclass(frozen=True)
class PullStats:
    """What one pull moved and how long it took."""

    size_bytes: int
    blocks: int
    transfer_s: float
    verify_s: float


@dataclass(frozen=True)
class _Peer:
    incarnation: int
    role: str
    """In metrics and spans."""
    agent: str
    arenas: dict[SlabKind, ArenaInfo]


class KvPuller:
    """Reads slabs of other workers into local ones. Lives in the event loop.

    Args:
        slab_view: the local bytes of a slab, for verification.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        secret: bytes,
        layout: Layout,
        transport: Transport,
        arenas: list[ArenaInfo],
        slab_view: Callable[[SlabKind, int], memoryview],
        registry: RegistryView,
        channels: ChannelPool,
        metrics: Metrics,
    ) -> None:
        self._worker_id = worker_id
        self._secret = secret
        self._layout = layout
        self._transport = transport
        self._arenas = {arena.kind: arena for arena in arenas}
        self._slab_view = slab_view
        self._registry = registry
        self._channels = channels
        self._metrics = metrics
        self._peers: dict[str, _Peer] = {}
        self._connecting: dict[str, asyncio.Lock] = {}
        self._leases: set[HeldLease] = set()
        self._none_held = asyncio.Event()
        self._none_held.set()

    async def settled(self) -> None:
        """Returns when no lease is held any more, of calls that were cut too; after a few seconds in any case. To be
        awaited before channels are closed, or peers keep slabs until their leases end.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                await self._none_held.wait()

    def note_held(self, lease: HeldLease) -> None:
        """A lease begins to be held."""
        self._leases.add(lease)
        self._none_held.clear()

    def note_closed(self, lease: HeldLease) -> None:
        """A lease is not held any more."""
        self._leases.discard(lease)
        if not self._leases:
            self._none_held.set()

    def open(self, handle: kv_pb2.KvHandle) -> kv_pb2.KvClaims:
        """The claims of a handle, checked against signature, layout and arithmetic.

        Raises:
            HandleForgedError, LayoutMismatchError.
        """
        try:
            claims = handles.open_handle(handle, self._secret)
            self._check(claims)
        except HandoffError as error:
            self._metrics.handoff_failures.labels(error.reason).inc()
            raise
        return claims

    @asynccontextmanager
    async def lease(self, claims: kv_pb2.KvClaims, request_id: str) -> AsyncIterator[HeldLease]:
        """Keeps the lease of a handle alive while the context is open, and releases it at the end.

        Raises:
            TransferError: the peer that holds the slabs is lost.
        """
        lease = HeldLease(self, claims, request_id)
        try:
            yield lease
        except WorkerLostError as error:  # of the peer: to our caller, we are not the worker that is lost
            self._metrics.handoff_failures.labels(TransferError.reason).inc()
            raise TransferError(error.message) from error
        except HandoffError as error:
            self._metrics.handoff_failures.labels(error.reason).inc()
            raise
        finally:
            await lease.close()

    async def connect_early(self, records: list[WorkerRecord]) -> None:
        """Connects to workers whose layout we read and that we do not know yet, so that no request pays for it."""
        for worker_id in [w for w in self._peers if self._registry.find(w) is None]:
            gone = self._peers.pop(worker_id, None)  # a pull that failed may have forgotten it meanwhile
            if gone is not None:
                await self._transport.disconnect(gone.agent)  # it will come back with another name
        for record in records:
            peer = self._peers.get(record.worker_id)
            known = peer is not None and peer.incarnation == record.incarnation
            if not known and self._layout.fingerprint in record.capabilities.readable_layouts:
                with suppress(ZipserveError):
                    await self._connect(record.worker_id, record.incarnation, _RPC_TIMEOUT_S)

    async def read(self, claims: kv_pb2.KvClaims, local_slabs: SequenceOf[int | None], deadline: Deadline) -> PullStats:
        """Reads the slabs of `claims.refs` into local slabs of the same kinds, in order. Verifies nothing.

        Args:
            local_slabs: one for each reference; None: it is not to be read.

        Raises:
            HandoffError: of the class that tells what was wrong. DeadlineError. WorkerLostError.
        """
        try:
            with tracing.span("kv.connect"):
                peer = await self._connect(claims.worker_id, claims.incarnation, deadline.remaining_s(_RPC_TIMEOUT_S))
        except WorkerLostError:
            deadline.remaining_s()  # when it has passed meanwhile, then that is the reason
            raise
        wanted = _wanted(claims, local_slabs)
        if not wanted:
            return PullStats(0, 0, 0.0, 0.0)
        ranges = [self._range(peer, ref, slab) for ref, slab in wanted]
        started_s = time.monotonic()
        types = (peer.arenas[SlabKind.BLOCK].memory_type, self._arenas[SlabKind.BLOCK].memory_type)
        try:
            with tracing.span("kv.transfer", {"zipserve.kv.slabs": len(ranges)}) as span:
                size_bytes = await self._transport.read(peer.agent, ranges, types, deadline.remaining_s())
                span.set_attribute("zipserve.kv.bytes", size_bytes)
        finally:
            # else the transport has dropped it, and the next pull connects anew
            if self._peers.get(claims.worker_id) is peer and not self._transport.is_connected(peer.agent):
                del self._peers[claims.worker_id]
        read_s = time.monotonic()
        self._metrics.transfer_bytes.labels(peer.role).inc(size_bytes)
        self._metrics.transfer_seconds.labels(peer.role).observe(read_s - started_s)
        blocks = sum(ref.kind == kv_pb2.SLAB_KIND_BLOCK for ref, _ in wanted)
        return PullStats(size_bytes, blocks, read_s - started_s, 0.0)

    async def verify(self, claims: kv_pb2.KvClaims, local_slabs: SequenceOf[int | None]) -> None:
        """Compares what was read with the claims.

        Raises:
            HandoffError: of the class that tells what was wrong.
        """
        with tracing.span("kv.verify"), self._metrics.verify_seconds.time():
            await asyncio.to_thread(self._verify, claims, _wanted(claims, local_slabs))

    async def stub(self, worker_id: str, incarnation: int) -> "kv_transfer_service_pb2_grpc.KvTransferServiceAsyncStub":
        """The KvTransferService of one life of a worker.

        Raises:
            WorkerLostError: the registry does not know the worker.
            IncarnationError: it knows another life of it.
        """
        return kv_transfer_service_pb2_grpc.KvTransferServiceStub(await self._channel(worker_id, incarnation))

    async def store_stub(self, worker_id: str, incarnation: int) -> "kv_store_service_pb2_grpc.KvStoreServiceAsyncStub":
        """The KvStoreService of one life of a worker; raises as `stub` does."""
        return kv_store_service_pb2_grpc.KvStoreServiceStub(await self._channel(worker_id, incarnation))

    async def _channel(self, worker_id: str, incarnation: int) -> grpc.aio.Channel:
        record = await self._find(worker_id, incarnation)
        return self._channels.get(record.capabilities.address)

    def _check(self, claims: kv_pb2.KvClaims) -> None:
        if claims.layout_fingerprint != self._layout.fingerprint:
            raise LayoutMismatchError(
                f"the handle has layout {claims.layout_fingerprint.hex()[:16]}, this worker reads "
                f"{self._layout.fingerprint.hex()[:16]} ({self._layout.description})"
            )
        expected = self._layout.slabs_of(claims.tokens)
        if not expected or len(expected) != len(claims.refs):
            raise LayoutMismatchError(
                f"the handle has {len(claims.refs)} slabs, its {claims.tokens} tokens take {len(expected)}"
            )
        for ref, (kind, position, tokens) in zip(claims.refs, expected, strict=True):
            wanted = (kind.value, position, tokens, self._layout.wire_bytes(kind, tokens))
            if (ref.kind, ref.start_position, ref.tokens, ref.bytes) != wanted:
                raise LayoutMismatchError(
                    f"the slab of kind {ref.kind} at position {ref.start_position} does not fit the layout"
                )

    def _range(self, peer: _Peer, ref: kv_pb2.BlockRef, local_slab: int) -> Range:
        kind = SlabKind(ref.kind)
        remote, local = peer.arenas[kind], self._arenas[kind]
        if ref.slab >= remote.slabs or ref.bytes > remote.slab_bytes:
            raise LayoutMismatchError(f"slab {ref.slab} of {ref.bytes} bytes lies outside the peer's arena")
        return Range(remote.address(ref.slab), remote.device_id, local.address(local_slab), local.device_id, ref.bytes)

    def _verify(self, claims: kv_pb2.KvClaims, read: list[tuple[kv_pb2.BlockRef, int]]) -> None:
        for ref, slab in read:
            kind = SlabKind(ref.kind)
            expected = identity_of(ref, claims.layout_fingerprint, claims.incarnation)
            view = self._slab_view(kind, slab)[: ref.bytes]
            try:
                verify(view, expected, ref.checksum)
            except BlockStaleError as error:
                if generation_of(view) in {other.generation for other in claims.refs if other.kind == ref.kind}:
                    where = ref.start_position
                    raise BlockSwappedError(f"slab at position {where} holds another block of the sequence") from error
                raise

    async def _connect(self, worker_id: str, incarnation: int, timeout_s: float) -> _Peer:
        try:
            async with asyncio.timeout(timeout_s), self._connecting.setdefault(worker_id, asyncio.Lock()):
                return await self._connect_alone(worker_id, incarnation)
        except (TimeoutError, DeadlineError) as error:
            raise WorkerLostError(f"worker {worker_id} did not answer within {timeout_s:.1f} s") from error

    async def _connect_alone(self, worker_id: str, incarnation: int) -> _Peer:
        peer = self._peers.get(worker_id)
        if peer is not None and peer.incarnation == incarnation:
            return peer
        if peer is not None:
            del self._peers[worker_id]
            await self._transport.disconnect(peer.agent)
        record = await self._find(worker_id, incarnation)
        stub = kv_transfer_service_pb2_grpc.KvTransferServiceStub(self._channels.get(record.capabilities.address))
        request = kv_transfer_service_pb2.ConnectRequest(
            worker_id=self._worker_id,
            expected_incarnation=incarnation,
            layout_fingerprint=self._layout.fingerprint,
        )
        with client_errors():
            answer = await stub.Connect(request, metadata=tracing.outgoing(""))
        arenas = {SlabKind(a.kind): _arena(a) for a in answer.arenas if a.kind in _KINDS}
        if not set(arenas) >= set(self._arenas):
            raise LayoutMismatchError(f"{worker_id} offers no arena for some kind of slab")
        agent = await self._transport.connect(answer.agent_metadata)
        role = WorkerRole.Name(record.capabilities.role).removeprefix("WORKER_ROLE_").lower()
        self._peers[worker_id] = _Peer(incarnation, role, agent, arenas)
        _log.info("peer.connected", peer=worker_id, peer_incarnation=f"{incarnation:016x}")
        return self._peers[worker_id]

    async def _find(self, worker_id: str, incarnation: int) -> WorkerRecord:
        record = self._registry.find(worker_id)
        if record is None or record.incarnation != incarnation:
            with suppress(RedisError, OSError):
                await self._registry.refresh()  # it, or this process, may be younger than the last poll
            record = self._registry.find(worker_id)
        if record is None:
            raise WorkerLostError(f"worker {worker_id} is not in the registry")
        if record.incarnation != incarnation:
            raise IncarnationError(
                f"the handle is of incarnation {incarnation:016x} of {worker_id}, now {record.incarnation:016x}"
            )
        return record


def _wanted(claims: kv_pb2.KvClaims, local_slabs: SequenceOf[int | None]) -> list[tuple[kv_pb2.BlockRef, int]]:
    return [(ref, slab) for ref, slab in zip(claims.refs, local_slabs, strict=True) if slab is not None]


def _arena(message: kv_transfer_service_pb2.Arena) -> ArenaInfo:
    name = kv_transfer_service_pb2.MemoryType.Name(message.memory_type)
    return ArenaInfo(
        kind=SlabKind(message.kind),
        base_address=message.base_address,
        slab_bytes=message.slab_bytes,
        slabs=message.slabs,
        memory_type=name.removeprefix("MEMORY_TYPE_"),
        device_id=message.device_id,
    )
