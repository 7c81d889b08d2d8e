"""Who serves: something that is started, and then answers requests over any number of connections."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from zipserve.bench.cores import pin
from zipserve.bench.goodput.arrangements import Arrangement
from zipserve.bench.serve.endpoints import Ask, GrpcEndpoint
from zipserve.bench.stack import Stack
from zipserve.client import AsyncClient

Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Ask]]
"""Opens connections to a server that runs; leaving the context closes them."""


class Contestant(Protocol):
    """An arrangement of some server on this machine's cores."""

    @property
    def name(self) -> str:
        """Such as `apart`."""

    @property
    def devices(self) -> int:
        """Cores that it computes on."""

    @property
    def instances(self) -> int:
        """Processes that take requests in turns; each has had one after as many."""

    def served(self) -> AbstractContextManager[Connect]:
        """Runs it while the context is open.

        Raises:
            ZipserveError: it does not start.
        """


@dataclass(frozen=True)
class Zipserve:
    """A stack as `zipserve up` starts it, each worker then kept on its cores. The others run wherever there is room, as
    the client does."""

    arrangement: Arrangement
    model: str
    codec: str
    sequences: int
    """Most at once of a worker, where its arrangement says nothing else."""
    timeout_s: float
    """Of a request."""

    @property
    def name(self) -> str:
        """See Contestant."""
        return self.arrangement.name

    @property
    def devices(self) -> int:
        """See Contestant."""
        return self.arrangement.devices

    @property
    def instances(self) -> int:
        """See Contestant. The router takes those that are idle by turns."""
        return max(self.arrangement.prefill, self.arrangement.decode)

    @contextmanager
    def served(self) -> Iterator[Connect]:
        """See Contestant."""
        cores = self.arrangement.cores(sorted(os.sched_getaffinity(0)))
        with Stack(self.arrangement.up(self.model, self.codec, self.sequences)) as stack:
            processes = stack.workers()
            for worker, own in cores.items():
                pin(processes[worker], own)

            @asynccontextmanager
            async def connect() -> AsyncIterator[Ask]:
                async with AsyncClient(stack.address) as client:
                    yield GrpcEndpoint(client, self.timeout_s).ask

            yield connect
