"""The real NIXL transport with stages at which a test may step in."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from zipserve.common.transport import ArenaInfo, Range
from zipserve.common.transport.nixl import NixlTransport


async def _nothing() -> None:
    """A stage at which nothing happens."""


@dataclass
class Hooks:
    """Stages of every read. `open` is a `TransportFactory`."""

    before: Callable[[], Awaitable[None]] = _nothing
    after: Callable[[], Awaitable[None]] = _nothing
    reads: int = 0
    """Reads that have begun."""

    def open(self, name: str, arenas: Sequence[ArenaInfo]) -> "HookedNixl":
        return HookedNixl(self, name, arenas)


class HookedNixl(NixlTransport):
    """A `NixlTransport` that tells `Hooks` of its reads."""

    def __init__(self, hooks: Hooks, name: str, arenas: Sequence[ArenaInfo]) -> None:
        super().__init__(name, arenas)
        self._hooks = hooks

    async def read(self, peer: str, ranges: list[Range], memory_types: tuple[str, str], timeout_s: float) -> int:
        self._hooks.reads += 1
        await self._hooks.before()
        moved_bytes = await super().read(peer, ranges, memory_types, timeout_s)
        await self._hooks.after()
        return moved_bytes
