"""Who may still read what, and until when. Pure: the clock is passed in."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Lease(Generic[T]):
    """The right to read `resource` until `expires_at_s`."""

    lease_id: bytes
    resource: T
    issued_at_s: float
    expires_at_s: float


class LeaseTable(Generic[T]):
    """Leases by id. All times are seconds of one monotonic clock.

    A lease is alive before `expires_at_s` and dead from then on, whether or not `reap` has run: a late renewal or
    release never revives it. Not thread-safe: one thread owns it.
    """

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._leases: dict[bytes, Lease[T]] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def issue(self, lease_id: bytes, resource: T, now_s: float) -> Lease[T]:
        """Starts a lease.

        Raises:
            KeyError: the id is in use.
        """
        if lease_id in self._leases:
            raise KeyError(f"lease {lease_id.hex()} exists")
        lease = self._leases[lease_id] = Lease(lease_id, resource, now_s, now_s + self.ttl_s)
        return lease

    def renew(self, lease_id: bytes, now_s: float) -> bool:
        """Extends a lease by the full time from now on; False when it is not alive."""
        lease = self._leases.get(lease_id)
        if lease is None or now_s >= lease.expires_at_s:
            return False
        lease.expires_at_s = now_s + self.ttl_s
        return True

    def release(self, lease_id: bytes, now_s: float) -> tuple[Lease[T] | None, bool]:
        """Ends a lease: (the lease whose resource is to be freed now, whether it was alive)."""
        lease = self._leases.pop(lease_id, None)
        return lease, lease is not None and now_s < lease.expires_at_s

    def reap(self, now_s: float) -> list[Lease[T]]:
        """Removes and returns the leases that have expired; their resources are to be freed."""
        expired = [lease for lease in self._leases.values() if now_s >= lease.expires_at_s]
        for lease in expired:
            del self._leases[lease.lease_id]
        return expired

    def next_expiry_s(self) -> float | None:
        """When the next lease expires unless renewed; None when there is none."""
        return min((lease.expires_at_s for lease in self._leases.values()), default=None)
