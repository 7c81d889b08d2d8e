"""LeaseTable under any order of calls and any passing of time, against a model."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zipserve.common.kv.leases import LeaseTable

IDS = st.sampled_from([bytes([i]) * 16 for i in range(6)])


class LeaseMachine(RuleBasedStateMachine):
    """Every resource that is issued must be freed exactly once, by a release or by a reap."""

    @initialize(ttl_s=st.sampled_from([0.5, 3.0]))
    def start(self, ttl_s: float) -> None:
        self.table: LeaseTable[int] = LeaseTable(ttl_s)
        self.now_s = 100.0
        self.expiry_s: dict[bytes, float] = {}
        self.resource: dict[bytes, int] = {}
        self.issued = 0
        self.freed: list[int] = []

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(lease_id=IDS)
    def issue(self, lease_id: bytes) -> None:
        if lease_id in self.expiry_s:
            with pytest.raises(KeyError):
                self.table.issue(lease_id, -1, self.now_s)
            return
        lease = self.table.issue(lease_id, self.issued, self.now_s)
        assert (lease.lease_id, lease.resource, lease.issued_at_s) == (lease_id, self.issued, self.now_s)
        self.resource[lease_id] = self.issued
        self.issued += 1
        self.expiry_s[lease_id] = self.now_s + self.table.ttl_s

    @rule(lease_id=IDS)
    def renew(self, lease_id: bytes) -> None:
        alive = self._alive(lease_id)
        assert self.table.renew(lease_id, self.now_s) is alive
        if alive:
            self.expiry_s[lease_id] = self.now_s + self.table.ttl_s

    @rule(lease_id=IDS)
    def release(self, lease_id: bytes) -> None:
        alive = self._alive(lease_id)
        lease, was_alive = self.table.release(lease_id, self.now_s)
        assert was_alive is alive
        assert (lease is not None) is (lease_id in self.expiry_s)
        if lease is not None:
            self._freed(lease.lease_id, lease.resource)

    @rule()
    def reap(self) -> None:
        expected = {lease_id for lease_id, at_s in self.expiry_s.items() if self.now_s >= at_s}
        reaped = self.table.reap(self.now_s)
        assert {lease.lease_id for lease in reaped} == expected
        for lease in reaped:
            self._freed(lease.lease_id, lease.resource)

    @invariant()
    def agrees(self) -> None:
        assert len(self.table) == len(self.expiry_s)
        assert self.table.next_expiry_s() == min(self.expiry_s.values(), default=None)
        assert len(set(self.freed)) == len(self.freed), "freed twice"
        assert len(self.freed) + len(self.table) == self.issued, "a resource is neither leased nor freed"

    def _alive(self, lease_id: bytes) -> bool:
        return lease_id in self.expiry_s and self.now_s < self.expiry_s[lease_id]

    def _freed(self, lease_id: bytes, resource: int) -> None:
        assert resource == self.resource.pop(lease_id)
        del self.expiry_s[lease_id]
        self.freed.append(resource)


TestLeases = LeaseMachine.TestCase


def test_a_dead_lease_never_comes_back() -> None:
    table: LeaseTable[str] = LeaseTable(2.0)
    table.issue(b"id", "slabs", 0.0)
    assert table.renew(b"id", 1.999)
    assert not table.renew(b"id", 3.999), "the end belongs to death"
    lease, was_alive = table.release(b"id", 3.999)
    assert lease is not None
    assert not was_alive
