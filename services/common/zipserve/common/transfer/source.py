"""The side that holds slabs: issues signed handles under leases, and frees the slabs when a lease ends."""

import asyncio
import secrets
import time
from collections.abc import Callable

from zipserve.common import log
from zipserve.common.errors import IncarnationError, InvalidRequestError, LayoutMismatchError, UnavailableError
from zipserve.common.kv import handle as handles
from zipserve.common.kv.layout import Layout
from zipserve.common.kv.leases import Lease, LeaseTable
from zipserve.common.kv.pools import Slabs
from zipserve.common.metrics import Metrics
from zipserve.common.rpc import Context
from zipserve.common.rpc.duration import to_duration
from zipserve.common.transport import ArenaInfo, Transport
from zipserve.v1 import kv_pb2, kv_transfer_service_pb2, kv_transfer_service_pb2_grpc

_log = log.get()
LEASES_PER_CALL_MAX = 4096


class KvSource(kv_transfer_service_pb2_grpc.KvTransferServiceServicer):
    """Leases of one worker, and the KvTransferService over them. Lives in the event loop.

    `on_free` is called with the slabs of every lease that ends, exactly once each; set it before the first `issue`.
    """

    on_free: Callable[[Slabs], None]

    def __init__(
        self,
        *,
        worker_id: str,
        incarnation: int,
        secret: bytes,
        lease_ttl_s: float,
        metrics: Metrics,
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._secret = secret
        self._layout: Layout | None = None
        self._metrics = metrics
        self._leases: LeaseTable[Slabs] = LeaseTable(lease_ttl_s)
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._transport: Transport | None = None
        self._arenas: list[ArenaInfo] = []

    def attach(self, transport: Transport, arenas: list[ArenaInfo], layout: Layout) -> None:
        """Says where the slabs are, and what is in them; before this, nobody can connect."""
        self._transport, self._arenas, self._layout = transport, arenas, layout

    @property
    def leases(self) -> int:
        """Leases that have not ended."""
        return len(self._leases)

    def issue(self, refs: list[kv_pb2.BlockRef], tokens: int, held: Slabs) -> kv_pb2.KvHandle:
        """Starts a lease over sealed slabs and returns the signed handle."""
        assert self._layout is not None
        lease = self._leases.issue(secrets.token_bytes(handles.LEASE_ID_BYTES), held, time.monotonic())
        self._changed()
        claims = kv_pb2.KvClaims(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            layout_fingerprint=self._layout.fingerprint,
            refs=refs,
            tokens=tokens,
            lease_id=lease.lease_id,
            lease_ttl=to_duration(self._leases.ttl_s),
        )
        return handles.sign(claims, self._secret)

    def release_handle(self, handle: kv_pb2.KvHandle) -> None:
        """Ends the lease of a handle of ours.

        Raises:
            HandleForgedError: it was not issued under the cluster's secret.
        """
        self.release(handles.open_handle(handle, self._secret).lease_id)

    async def run_reaper(self) -> None:
        """Frees the slabs of expired leases, for ever."""
        while True:
            now_s = time.monotonic()
            for lease in self._leases.reap(now_s):
                self._metrics.leases_expired.inc()
                _log.warning("lease.expired", lease_id=lease.lease_id.hex(), held_s=round(now_s - lease.issued_at_s, 3))
                self._free_lease(lease)
            expiry_s = self._leases.next_expiry_s()
            await asyncio.sleep(min(max(0.01, (expiry_s or now_s + 0.5) - now_s), 0.5))

    async def no_leases(self) -> None:
        """Returns when no lease is left."""
        await self._none_left.wait()

    async def Connect(
        self, request: kv_transfer_service_pb2.ConnectRequest, context: Context
    ) -> kv_transfer_service_pb2.ConnectResponse:
        if request.expected_incarnation != self._incarnation:
            raise IncarnationError(
                f"{self._worker_id} is incarnation {self._incarnation:016x}, not {request.expected_incarnation:016x}"
            )
        if self._layout is None or self._transport is None:
            raise UnavailableError(f"{self._worker_id} holds no slabs yet")
        if request.layout_fingerprint != self._layout.fingerprint:
            raise LayoutMismatchError(
                f"{self._worker_id} holds layout {self._layout.fingerprint.hex()[:16]} ({self._layout.description}), "
                f"{request.worker_id} reads {request.layout_fingerprint.hex()[:16]}"
            )
        return kv_transfer_service_pb2.ConnectResponse(
            incarnation=self._incarnation,
            agent_metadata=self._transport.metadata(),
            arenas=[_arena_message(arena) for arena in self._arenas],
        )

    async def RenewLeases(
        self, request: kv_transfer_service_pb2.RenewLeasesRequest, context: Context
    ) -> kv_transfer_service_pb2.RenewLeasesResponse:
        if len(request.lease_ids) > LEASES_PER_CALL_MAX:
            raise InvalidRequestError(
                f"renews {len(request.lease_ids)} leases, at most {LEASES_PER_CALL_MAX} in a call", field="lease_ids"
            )
        now_s = time.monotonic()
        lost = [lease_id for lease_id in request.lease_ids if not self._leases.renew(lease_id, now_s)]
        self._expect_readers()  # who renews a lease is reading, or about to
        return kv_transfer_service_pb2.RenewLeasesResponse(
            lost_lease_ids=lost, lease_ttl=to_duration(self._leases.ttl_s)
        )

    async def ReleaseLease(
        self, request: kv_transfer_service_pb2.ReleaseLeaseRequest, context: Context
    ) -> kv_transfer_service_pb2.ReleaseLeaseResponse:
        return kv_transfer_service_pb2.ReleaseLeaseResponse(was_alive=self.release(request.lease_id))

    def release(self, lease_id: bytes) -> bool:
        """Ends a lease, if there is one; whether it was alive."""
        lease, was_alive = self._leases.release(lease_id, time.monotonic())
        if lease is not None:
            self._free_lease(lease)
        return was_alive

    def _free_lease(self, lease: Lease[Slabs]) -> None:
        self.on_free(lease.resource)
        self._changed()

    def _changed(self) -> None:
        self._metrics.leases.set(len(self._leases))
        self._expect_readers()
        if len(self._leases):
            self._none_left.clear()
        else:
            self._none_left.set()

    def _expect_readers(self) -> None:
        if self._transport is not None:
            self._transport.expect_readers(len(self._leases) > 0)


def _arena_message(arena: ArenaInfo) -> kv_transfer_service_pb2.Arena:
    memory_type = kv_transfer_service_pb2.MemoryType.Value(f"MEMORY_TYPE_{arena.memory_type}")
    return kv_transfer_service_pb2.Arena(
        kind=arena.kind.value,  # type: ignore[arg-type]  # our enum has the numbers of the proto
        base_address=arena.base_address,
        slab_bytes=arena.slab_bytes,
        slabs=arena.slabs,
        memory_type=memory_type,
        device_id=arena.device_id,
    )
