"""A `Transport` inside one process: reads are plain copies between registered arenas, and every fault can be staged.

It keeps the contract of the real one: after an error, a passed deadline or a cancellation the peer is disconnected, and
nothing is written to the reader's slabs once `read` has ended.
"""

import asyncio
import ctypes
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from zipserve.common.errors import DeadlineError, TransferError
from zipserve.common.transport import ArenaInfo, Range


async def _nothing() -> None:
    """A stage at which nothing happens."""


@dataclass
class Faults:
    """What goes wrong in every read from now on; the defaults are a read that works."""

    before: Callable[[], Awaitable[None]] = _nothing
    """Awaited before the first byte moves: a slow read, or one that never begins."""
    halfway: Callable[[], Awaitable[None]] = _nothing
    """Awaited after the first half of every slab has moved; changing the source here tears the read."""
    after: Callable[[], Awaitable[None]] = _nothing
    """Awaited after the last byte has moved, before the read ends."""
    swap: bool = False
    """The first two slabs arrive in each other's place."""
    flip: tuple[int, int, int] | None = None
    """(descriptor, byte, bit) that arrives inverted; a negative byte counts from the descriptor's end."""
    dead: bool = False
    """The peer does not answer any more."""


@dataclass
class Fabric:
    """All agents that can meet, and the faults of the reads between them. `open` is a `TransportFactory`."""

    faults: Faults = field(default_factory=Faults)
    agents: dict[bytes, "MemoryTransport"] = field(default_factory=dict)
    reads: int = 0
    """Reads that have begun."""
    connects: int = 0

    def open(self, name: str, arenas: Sequence[ArenaInfo]) -> "MemoryTransport":
        return MemoryTransport(self, name, arenas)


class MemoryTransport:
    """One agent of a `Fabric`."""

    def __init__(self, fabric: Fabric, name: str, arenas: Sequence[ArenaInfo]) -> None:
        self._fabric = fabric
        self._name = name.encode()
        self._connected: set[str] = set()
        self.arenas = list(arenas)
        fabric.agents[self._name] = self

    def metadata(self) -> bytes:
        return self._name

    async def connect(self, metadata: bytes) -> str:
        if metadata not in self._fabric.agents:
            raise TransferError(f"no agent {metadata!r}")
        self._fabric.connects += 1
        self._connected.add(metadata.decode())
        return metadata.decode()

    def is_connected(self, peer: str) -> bool:
        return peer in self._connected

    async def disconnect(self, peer: str) -> None:
        self._connected.discard(peer)

    async def read(self, peer: str, ranges: list[Range], memory_types: tuple[str, str], timeout_s: float) -> int:
        source = self._fabric.agents.get(peer.encode())
        if source is None or peer not in self._connected:
            raise TransferError(f"{peer} is not connected")
        assert ranges, "a read of nothing"
        for one in ranges:
            assert source.owns(one.remote_address, one.size_bytes), "outside of the peer's registered memory"
            assert self.owns(one.local_address, one.size_bytes), "outside of our registered memory"
        self._fabric.reads += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._copy(ranges)
        except BaseException as error:
            self._connected.discard(peer)
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"{peer} did not deliver in time") from error
            raise
        return sum(one.size_bytes for one in ranges)

    async def _copy(self, ranges: list[Range]) -> None:
        faults = self._fabric.faults
        await faults.before()
        if faults.dead:
            raise TransferError("the peer is dead")
        sources = [one.remote_address for one in ranges]
        if faults.swap:
            sources[:2] = reversed(sources[:2])
        for part in (0, 1):
            for address, one in zip(sources, ranges, strict=True):
                half = one.size_bytes // 2
                start, size = (0, half) if part == 0 else (half, one.size_bytes - half)
                ctypes.memmove(one.local_address + start, address + start, size)
            if part == 0:
                await faults.halfway()
        if faults.flip is not None:
            descriptor, byte, bit = faults.flip
            one = ranges[descriptor]
            flip_bit(one.local_address + byte % one.size_bytes, bit)
        await faults.after()

    def owns(self, address: int, size_bytes: int) -> bool:
        """Whether a region lies inside one registered arena."""
        return any(
            arena.base_address <= address and address + size_bytes <= arena.base_address + arena.size_bytes
            for arena in self.arenas
        )

    def expect_readers(self, expected: bool) -> None:
        """Nobody has to poll."""

    def close(self) -> None:
        self._fabric.agents.pop(self._name, None)


def flip_bit(address: int, bit: int) -> None:
    """Inverts one bit of this process's memory."""
    byte = ctypes.c_uint8.from_address(address)
    byte.value ^= 1 << bit
