"""The source as the reader sees it: a child process, and an address."""

import asyncio
import base64
import json
import sys
from dataclasses import asdict
from types import TracebackType
from typing import Any

from zipserve.bench.transfer.sequences import INCARNATION, Capacity
from zipserve.bench.transfer.source import WORKER_ID
from zipserve.common.errors import InternalError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.registry import RegistryView, WorkerRecord
from zipserve.common.transport import ArenaInfo
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.worker_service_pb2 import Capabilities, Load

_LINE_BYTES_MAX = 1 << 20
_START_S = 60.0
_STOP_S = 10.0


class AddressBook(RegistryView):
    """A registry of one worker that never changes; between two lookups a pull has nothing to do with Redis."""

    def __init__(self, address: str) -> None:
        self._record = WorkerRecord(
            Capabilities(worker_id=WORKER_ID, incarnation=INCARNATION, address=address), Load(), 1
        )

    def find(self, worker_id: str) -> WorkerRecord | None:
        return self._record if worker_id == WORKER_ID else None

    async def refresh(self) -> None:
        """There are no news."""


class Source:
    """Runs while the context is open; see `zipserve.bench.transfer.source` for its side."""

    def __init__(self, layout: Layout, capacity: Capacity) -> None:
        options = json.dumps({"layout": asdict(layout), "blocks": capacity.blocks})
        self._command = [sys.executable, "-P", "-m", "zipserve.bench.transfer.source", options]

    async def __aenter__(self) -> "Source":
        """
        Raises:
            InternalError: it does not start.
        """
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, limit=_LINE_BYTES_MAX
        )
        try:
            async with asyncio.timeout(_START_S):
                told = await self._answer()
        except BaseException:
            await self._stop()
            raise
        self.address: str = told["address"]
        self.raw_metadata = base64.b64decode(told["raw_metadata"])
        self.arenas = {
            SlabKind(arena["kind"]): ArenaInfo(**{**arena, "kind": SlabKind(arena["kind"])}) for arena in told["arenas"]
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def seal(self, tokens: int) -> int:
        """See `Requests.seal`."""
        return int(await self._ask("seal", tokens))

    async def issue(self, sequence: int) -> KvHandle:
        """See `Requests.issue`."""
        return KvHandle.FromString(base64.b64decode(await self._ask("issue", sequence)))

    async def poll(self, pause_s: float) -> None:
        """Lets it do nothing but `RawSource.poll_until_asked`, until it is asked for something else."""
        await self._ask("poll", pause_s)

    async def _ask(self, name: str, *arguments: float) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise InternalError(f"the source's process ended with status {await self._process.wait()}")
        return json.loads(line)

    async def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
