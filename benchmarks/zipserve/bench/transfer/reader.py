"""The process that reads: pulls as a decode worker makes them, and the controls, in turns.

Started once for each way of UCX and each codec, because UCX takes its settings when it is loaded. Prints one line of
JSON for each length of sequences.
"""

import asyncio
import ctypes
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from zipserve.bench.timing import Timing
from zipserve.bench.transfer.peer import AddressBook, Source
from zipserve.bench.transfer.raw import RawReader
from zipserve.bench.transfer.sequences import Capacity, Memory, slabs_of
from zipserve.bench.transfer.source import SECRET
from zipserve.common import log
from zipserve.common.errors import InternalError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import ChannelPool, Deadline
from zipserve.common.transfer.puller import KvPuller, PullStats
from zipserve.common.transport import Range
from zipserve.common.transport.nixl import NixlTransport
from zipserve.v1.kv_pb2 import KvClaims

_MESSAGE_BYTES_MAX = 4 << 20
_DEADLINE_S = 60.0
WARM_UP_ROUNDS = 2
RAW_PAUSES_S = {"raw, tight": 0.0, "raw, with pauses": 0.00002}
"""Between two polls of the control, in turns; what counts is the better one."""


@dataclass
class Reader:
    """Everything that takes turns, over two arenas: what is read goes to `memory`, `spare` is copied from."""

    source: Source
    puller: KvPuller
    raw: RawReader
    memory: Memory
    spare: Memory

    @classmethod
    @asynccontextmanager
    async def open(cls, layout: Layout, capacity: Capacity) -> AsyncIterator["Reader"]:
        """With a source of its own."""
        memory, spare = (Memory(layout, capacity, seed) for seed in (2, 3))
        async with Source(layout, capacity) as source, ChannelPool(_MESSAGE_BYTES_MAX) as channels:
            transport = NixlTransport("reader", memory.infos)
            try:
                await source.poll(0.0)
                raw = RawReader(memory.infos, source.raw_metadata)
                puller = KvPuller(
                    worker_id="reader",
                    secret=SECRET,
                    layout=layout,
                    transport=transport,
                    arenas=memory.infos,
                    slab_view=memory.view,
                    registry=AddressBook(source.address),
                    channels=channels,
                    metrics=Metrics(),
                )
                yield cls(source, puller, raw, memory, spare)
                await puller.settled()
            finally:
                transport.close()

    async def measure(self, tokens: int, rounds: int) -> dict[str, Any]:
        """Pulls of sequences of `tokens` tokens, and the controls.

        Every turn takes the next sequence, so that what it moves is in no cache if all of them together do not fit.

        Raises:
            HandoffError: what a control read is not what was sealed.
            InternalError: NIXL counted other bytes than the layout says.
        """
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        size_bytes = self.memory.layout.sequence_bytes(tokens)
        sequences = itertools.cycle(range(await self.source.seal(tokens)))
        self.memory.clear()
        for number in range(WARM_UP_ROUNDS + rounds):
            found, moved_bytes = await self._round(tokens, sequences)
            if moved_bytes != size_bytes:
                raise InternalError(
                    f"NIXL counted {moved_bytes} bytes of {tokens} tokens, the layout says {size_bytes}"
                )
            if number >= WARM_UP_ROUNDS:
                for way, spent_s in found.items():
                    seconds[way].append(spent_s)
        timings = {name: Timing.of(values) for name, values in seconds.items()}
        timings["raw"] = min((timings.pop(name) for name in RAW_PAUSES_S), key=lambda timing: timing.median_s)
        return {
            "tokens": tokens,
            "size_bytes": size_bytes,
            "seconds": {name: asdict(timing) for name, timing in timings.items()},
        }

    async def _round(self, tokens: int, sequences: "itertools.cycle[int]") -> tuple[dict[str, float], int]:
        """Seconds by way, and the bytes of the pull as NIXL counted them."""
        pulled, stats = await self._pull(tokens, next(sequences))
        found = {"pull": pulled, "transfer": stats.transfer_s}
        for name, pause_s in RAW_PAUSES_S.items():
            found[name], found["verify"] = await self._read_raw(next(sequences), pause_s)
        return {**found, "memcpy": self._copy(tokens, next(sequences))}, stats.size_bytes

    async def _pull(self, tokens: int, sequence: int) -> tuple[float, PullStats]:
        """Seconds of the whole pull, and what it says itself."""
        claims = self.puller.open(await self.source.issue(sequence))
        async with self.puller.lease(claims, "bench") as lease:
            started = time.perf_counter()
            stats = await lease.pull(slabs_of(self.memory.layout, tokens, sequence), Deadline(_DEADLINE_S))
            return time.perf_counter() - started, stats

    async def _read_raw(self, sequence: int, pause_s: float) -> tuple[float, float]:
        """Seconds of the control, and of verifying what it has read."""
        claims = self.puller.open(await self.source.issue(sequence))
        async with self.puller.lease(claims, "bench"):
            ranges = self._ranges(claims)
        await self.source.poll(pause_s)
        raw_s = self.raw.read(ranges, pause_s)
        started = time.perf_counter()
        self.memory.verify(list(claims.refs))
        return raw_s, time.perf_counter() - started

    def _ranges(self, claims: KvClaims) -> list[Range]:
        """Into slabs with the numbers of those that are read."""
        local = {arena.kind: arena for arena in self.memory.infos}
        return [
            Range(self.source.arenas[kind].address(ref.slab), 0, local[kind].address(ref.slab), 0, ref.bytes)
            for ref in claims.refs
            for kind in (SlabKind(ref.kind),)
        ]

    def _copy(self, tokens: int, sequence: int) -> float:
        """Seconds of as many bytes, slab by slab, from the spare arenas."""
        layout = self.memory.layout
        local = {arena.kind: arena for arena in self.memory.infos}
        spare = {arena.kind: arena for arena in self.spare.infos}
        copies = [
            (local[kind].address(slab), spare[kind].address(slab), layout.wire_bytes(kind, held))
            for (kind, _, held), slab in zip(
                layout.slabs_of(tokens), slabs_of(layout, tokens, sequence), strict=True
            )
        ]  # fmt: skip
        started = time.perf_counter()
        for copy in copies:
            ctypes.memmove(*copy)
        return time.perf_counter() - started


async def main(layout: Layout, lengths: list[int], rounds: int) -> None:
    """Measures sequences of all lengths, in tokens."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what NIXL prints is no result
    log.configure(level="error", style="console")
    async with Reader.open(layout, Capacity(max(layout.blocks_for(tokens) for tokens in lengths))) as reader:
        for tokens in lengths:
            print(json.dumps(await reader.measure(tokens, rounds)), file=answers, flush=True)


if __name__ == "__main__":
    _options = json.loads(sys.argv[1])
    asyncio.run(main(Layout(**_options["layout"]), _options["lengths"], _options["rounds"]))
