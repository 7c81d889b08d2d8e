"""A reader's hold on the slabs of a peer: a lease that is renewed until they are read, or will not be."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from zipserve.common import log, tracing
from zipserve.common.errors import DeadlineError, LeaseExpiredError, WorkerLostError, ZipserveError
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


class HeldLease:
    """A lease that is renewed in the background from its creation until `close`."""

    def __init__(self, puller: "KvPuller", claims: kv_pb2.KvClaims, request_id: str) -> None:
        self._puller = puller
        self._claims = claims
        self._metadata = tracing.outgoing(request_id)
        self._released = False
        self._confirmed = asyncio.Event()
        puller.note_held(self)
        self._lost = asyncio.create_task(self._keep(), name="lease-heartbeat")
        """Ends with the error that ended the lease."""

    async def pull(self, local_slabs: Sequence[int | None], deadline: Deadline) -> "PullStats":
        """Reads and verifies all slabs that are wanted, then releases the lease; see `KvPuller.pull`.

        Raises:
            LeaseExpiredError: it was not alive before, or not any more after the read; what was read is void.
            HandoffError, WorkerLostError, DeadlineError: see `KvPuller.pull`.
        """
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await self._confirmed.wait()
        except TimeoutError as error:
            raise DeadlineError("the deadline passed while a lease was to be confirmed") from error
        if self._lost.done():
            self._lost.result()
        stats = await self.while_alive(self._puller.pull(self._claims, local_slabs, deadline))
        if not await self._release(deadline.remaining_s(_RPC_TIMEOUT_S)):
            raise LeaseExpiredError(f"the lease of {self._claims.worker_id} expired during the read")
        return stats

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
            while True:
                stub = await self._puller.stub(self._claims.worker_id, self._claims.incarnation)
                with client_errors():
                    answer = await stub.RenewLeases(
                        request, timeout=min(ttl_s, _RPC_TIMEOUT_S), metadata=self._metadata
                    )
                if answer.lost_lease_ids:
                    raise LeaseExpiredError(f"the lease of {self._claims.worker_id} has expired")
                self._confirmed.set()
                await asyncio.sleep(ttl_s / _RENEWALS_PER_TTL)
        except DeadlineError as error:  # of the renewal, not of the request
            raise WorkerLostError(f"worker {self._claims.worker_id} does not answer") from error
        finally:
            self._confirmed.set()
