"""The process whose slabs are read: a `KvSource` and a NIXL transport as a prefill worker has them, but no model.

Takes requests as lines of JSON on stdin, answers each with one line on stdout, and ends with stdin.
"""

import asyncio
import base64
import json
import os
import sys
from dataclasses import asdict
from typing import Any, TextIO

import grpc

from zipserve.bench.transfer.raw import RawSource
from zipserve.bench.transfer.sequences import INCARNATION, Capacity, Memory
from zipserve.common import log
from zipserve.common.kv.layout import Layout
from zipserve.common.kv.pools import Slabs
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.interceptor import ServiceInterceptor
from zipserve.common.transfer.source import KvSource
from zipserve.common.transport.nixl import NixlTransport
from zipserve.v1 import kv_transfer_service_pb2_grpc
from zipserve.v1.kv_pb2 import BlockRef

WORKER_ID = "source"
SECRET = b"known to both"
_LEASE_TTL_S = 60.0


class Requests:
    """What the reader may ask for."""

    def __init__(self, source: KvSource, memory: Memory, capacity: Capacity) -> None:
        self._source = source
        self._memory = memory
        self._capacity = capacity
        self._tokens = 0
        self._sequences: list[list[BlockRef]] = []

    def seal(self, tokens: int) -> int:
        """Fills the arenas with as many sequences of `tokens` tokens as there is room for; returns how many."""
        self._tokens = tokens
        count = self._capacity.sequences(self._memory.layout, tokens)
        self._sequences = [self._memory.seal(tokens, sequence) for sequence in range(count)]
        return count

    def issue(self, sequence: int) -> str:
        """A handle of a sequence, under a new lease; base64."""
        handle = self._source.issue(self._sequences[sequence], self._tokens, Slabs())
        return base64.b64encode(handle.SerializeToString()).decode()


async def main(layout: Layout, capacity: Capacity) -> None:
    """Serves until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what NIXL prints is no answer
    log.configure(level="error", style="console")
    memory, metrics = Memory(layout, capacity, seed=1), Metrics()
    source = KvSource(
        worker_id=WORKER_ID,
        incarnation=INCARNATION,
        secret=SECRET,
        lease_ttl_s=_LEASE_TTL_S,
        metrics=metrics,
    )
    source.on_free = lambda _: None  # the slabs stay for the next lease
    server = grpc.aio.server(interceptors=[ServiceInterceptor(metrics)])
    kv_transfer_service_pb2_grpc.add_KvTransferServiceServicer_to_server(source, server)
    port = server.add_insecure_port("127.0.0.1:0")
    transport = NixlTransport(WORKER_ID, memory.infos)
    try:
        source.attach(transport, memory.infos, layout)
        await server.start()
        raw = RawSource(memory.infos)
        requests = Requests(source, memory, capacity)

        def answer(value: Any) -> None:
            print(json.dumps(value), file=answers, flush=True)

        answer(
            {
                "address": f"127.0.0.1:{port}",
                "raw_metadata": base64.b64encode(raw.metadata).decode(),
                "arenas": [asdict(arena) for arena in memory.infos],
            }
        )
        asked = await _lines(sys.stdin)
        while line := await asked.readline():
            name, arguments = json.loads(line)
            if name == "poll":
                answer(None)
                raw.poll_until_asked(sys.stdin.fileno(), *arguments)
            else:
                answer(getattr(requests, name)(*arguments))
    finally:
        await server.stop(0)
        transport.close()


async def _lines(file: TextIO) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return reader


if __name__ == "__main__":
    _options = json.loads(sys.argv[1])
    asyncio.run(main(Layout(**_options["layout"]), Capacity(_options["blocks"])))
