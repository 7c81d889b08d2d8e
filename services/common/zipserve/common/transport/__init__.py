"""Moves KV bytes between the registered arenas of two workers.

`Transport` is what the transfer layer needs; `zipserve.common.transport.nixl` is the one that ships.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from zipserve.common.kv.layout import SlabKind


@dataclass(frozen=True)
class ArenaInfo:
    """A registered region of equal slabs, in its owner's address space."""

    kind: SlabKind
    base_address: int
    slab_bytes: int
    slabs: int
    memory_type: str
    """DRAM or VRAM."""
    device_id: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole region."""
        return self.slab_bytes * self.slabs

    def address(self, slab: int) -> int:
        """Address of a slab.

        Raises:
            IndexError: there is no such slab.
        """
        if not 0 <= slab < self.slabs:
            raise IndexError(f"slab {slab} of {self.slabs}")
        return self.base_address + slab * self.slab_bytes


class Range(NamedTuple):
    """One descriptor of a read."""

    remote_address: int
    remote_device: int
    local_address: int
    local_device: int
    size_bytes: int


TransportFactory: TypeAlias = Callable[[str, Sequence["ArenaInfo"]], "Transport"]
"""Opens a transport: agent name, and regions to register."""


class Transport(Protocol):
    """Pull-only access to peers' memory."""

    def metadata(self) -> bytes:
        """What a peer must hand to its own `connect`."""

    async def connect(self, metadata: bytes) -> str:
        """Makes a peer readable and returns its name.

        Raises:
            TransferError: the metadata is not usable.
        """

    def is_connected(self, peer: str) -> bool:
        """Whether a read of it has a chance."""

    async def disconnect(self, peer: str) -> None:
        """Forgets a peer; connecting to it again is possible."""

    async def read(self, peer: str, ranges: list[Range], memory_types: tuple[str, str], timeout_s: float) -> int:
        """Reads all ranges. `memory_types` are (remote, local).

        Returns the bytes that were moved, as the transport itself has counted them.

        When this returns or raises, also by cancellation, nothing writes to the local addresses any more. For that, a
        read that is cancelled or late may go on for a moment.

        Raises:
            TransferError: the peer is gone or the transport failed; the peer is then disconnected.
            DeadlineError: the time ran out; the peer is then disconnected.
        """

    def expect_readers(self, expected: bool) -> None:
        """Says whether peers may be reading now, so that the transport keeps its side moving.

        To be said again when a read is about to begin: for a moment it then moves faster.
        """

    def close(self) -> None:
        """Ends all transfers and deregisters the memory."""
