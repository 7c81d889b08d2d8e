"""A reader's hold on the slabs of a peer: a lease that is renewed until they are read, or will not be."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from zipserve.common import log, tracing
from zipserve.common.errors import DeadlineError, HandoffError, LeaseExpiredError, WorkerLostError, ZipserveError
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.rpc.status import client_errors
from zipserve.v1 import kv_pb2, kv_transfer_service_pb2

if TYPE_CHECKING:
    from zipserve.common.transfer.puller import KvPuller, PullStats

T = TypeVar("T")
_log = log.get()
_RPC_TIMEOUT_S = 5.0
_LAST_TRY_TIMEOUT_S = 0.5
_RENEWALS_PER_TTL = 3
_FIRST_RENEWAL_S = 0.05
"""Most leases are over before that, and spare both sides the call."""


class HeldLease:
    """A lease that is renewed in the background from its creation until `close`."""

    def __init__(self, puller: "KvPuller", claims: kv_pb2.KvClaims, request_id: str) -> None:
        self._puller = puller
        self._claims = claims
        self._metadata = tracing.outgoing(request_id)
        self._released = False
        puller.note_held(self)
        self._lost = asyncio.create_task(self._keep(), name="lease-heartbeat")
        """Ends with the error that ended the lease."""

    async def pull(self, local_slabs: Sequence[int | None], deadline: Deadline) -> "PullStats":
        """Reads and verifies all slabs that are wanted, and releases the lease; see `KvPuller.read` and `verify`.

        Whether the lease was alive when the read had ended is the answer to its release; until then nothing counts.

        Raises:
            LeaseExpiredError: it was not alive before, or not any more after the read; what was read is void.
            HandoffError, WorkerLostError, DeadlineError: see `KvPuller`.
        """
        with tracing.span("kv.pull", {"zipserve.peer": self._claims.worker_id}) as span:
            stats = await self._pull(local_slabs, deadline)
            span.set_attributes({"zipserve.kv.bytes": stats.size_bytes, "zipserve.kv.blocks": stats.blocks})
        return stats

    async def _pull(self, local_slabs: Sequence[int | None], deadline: Deadline) -> "PullStats":
        stats = await self.while_alive(self._puller.read(self._claims, local_slabs, deadline))
        releasing = asyncio.create_task(self._release(deadline.remaining_s(_RPC_TIMEOUT_S)), name="lease-release")
        started_s = time.monotonic()
        wrong: HandoffError | None = None
        try:
            try:
                await self._puller.verify(self._claims, local_slabs)
            except HandoffError as error:
                wrong = error
            verify_s = time.monotonic() - started_s
            was_alive = await releasing
        finally:
            releasing.cancel()  # when the caller goes away; `close` tries again
        if not was_alive:
            raise LeaseExpiredError(f"the lease of {self._claims.worker_id} expired during the read") from wrong
        if wrong is not None:
            raise wrong
        return replace(stats, verify_s=verify_s)

    async def close(self) -> None:
        """Stops renewing; releases the lease unless that has happened."""
        # also when the caller is being cancelled, at whatever point: the peer's slabs are freed at once, not at expiry
        await asyncio.shield(asyncio.create_task(self._close()))

    async def _close(self) -> None:
        try:
            is_lost = self._lost.done()
            self._lost.cancel()
            await asyncio.gather(self._lost, return_exceptions=True)
            if not self._released:
                await self._release(_LAST_TRY_TIMEOUT_S if is_lost else _RPC_TIMEOUT_S)
        finally:
            self._puller.note_closed(self)

    async def while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for something, but not for longer than the lease lives: a peer that is lost may never deliver.

        Raises:
            LeaseExpiredError, WorkerLostError, IncarnationError: the lease is lost, and `work` has ended, cancelled.
        """
        task = asyncio.create_task(work, name="while-lease-is-alive")
        try:
            await asyncio.wait({task, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else self._lost.result()
        finally:
            task.cancel()
            while not task.done():  # slabs are not free before their read has ended, even if we are cancelled again
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # it may have failed together with the lease: seen

    async def _release(self, timeout_s: float) -> bool:
        """True unless the peer said that the lease had expired; a dead peer is no reason to discard verified bytes."""
        request = kv_transfer_service_pb2.ReleaseLeaseRequest(lease_id=self._claims.lease_id)
        try:
            stub = await self._puller.stub(self._claims.worker_id, self._claims.incarnation)
            with client_errors():
                answer = await stub.ReleaseLease(request, timeout=timeout_s, metadata=self._metadata)
        except ZipserveError as error:
            _log.warning("lease.release_failed", peer=self._claims.worker_id, error=error.message)
            return True
        self._released = True
        return answer.was_alive

    async def _keep(self) -> NoReturn:
        """Renews the lease until it is lost; raises why it was."""
        ttl_s = to_seconds(self._claims.lease_ttl)
        request = kv_transfer_service_pb2.RenewLeasesRequest(lease_ids=[self._claims.lease_id])
        try:
            await asyncio.sleep(min(_FIRST_RENEWAL_S, ttl_s / _RENEWALS_PER_TTL))
            while True:
                stub = await self._puller.stub(self._claims.worker_id, self._claims.incarnation)
                with client_errors():
                    answer = await stub.RenewLeases(
                        request, timeout=min(ttl_s, _RPC_TIMEOUT_S), metadata=self._metadata
                    )
                if answer.lost_lease_ids:
                    raise LeaseExpiredError(f"the lease of {self._claims.worker_id} has expired")
                await asyncio.sleep(ttl_s / _RENEWALS_PER_TTL)
        except DeadlineError as error:  # of the renewal, not of the request
            raise WorkerLostError(f"worker {self._claims.worker_id} does not answer") from error
