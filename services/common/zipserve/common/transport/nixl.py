"""The NIXL transport: an agent that lends and one for each peer that is read, owned by one thread that polls them all.

The UCX backend makes progress only while its agent is polled, on both sides of a read. The thread polls every half
millisecond while a transfer runs or readers are expected, more often for some milliseconds after news, and rarely
otherwise; NIXL's own progress thread would spin on a whole core. NIXL raises unrelated classes for its statuses, hence
the broad excepts; none of its errors is fatal: the peer is dropped and can be connected again.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from zipserve.common import log
from zipserve.common.errors import DeadlineError, TransferError, ZipserveError
from zipserve.common.transport import ArenaInfo, Range

_log = log.get()
_POLL_LIVELY_S = 0.00002
"""With the time that a thread takes to wake up it is some 0.1 ms. Not 0: the event loop must get at the GIL."""
_POLL_BUSY_S = 0.0005
_POLL_IDLE_S = 0.02
_LIVELY_S = 0.005
"""For so long after news it polls more often: small reads take less, and to others half a millisecond is little."""
_MOVING_S = 0.0001
"""A poll that computes for so long has moved bytes."""
_GRACE_S = 0.5
T = TypeVar("T")


class _Answer(Generic[T]):
    """What the event loop waits for and the thread settles, at most once. Create it in the event loop.

    A concurrent Future wrapped for asyncio would do the same through two more turns of the loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()
        self.settled = False

    def give(self, value: T) -> None:
        self._settle(self.future.set_result, value)

    def fail(self, error: BaseException) -> None:
        self._settle(self.future.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], value: object) -> None:
        self.settled = True
        self._loop.call_soon_threadsafe(self._settle_in_loop, settle, value)

    def _settle_in_loop(self, settle: Callable[[Any], None], value: object) -> None:
        if not self.future.done():  # nobody waits any more
            settle(value)


class _Agent:
    """A NIXL agent over our arenas.

    Raises:
        TransferError: NIXL has no UCX backend, or refuses the memory.
    """

    def __init__(self, name: str, arenas: Sequence[ArenaInfo]) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # noqa: PLC0415  # takes seconds, and torch if installed

        logging.getLogger("nixl").setLevel(logging.WARNING)
        try:
            config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"], capture_telemetry=True)
            self.nixl: Any = nixl_agent(name, config)
            self._registered = [
                self.nixl.register_memory([(a.base_address, a.size_bytes, a.device_id, a.kind.name)], a.memory_type)
                for a in arenas
            ]
        except Exception as error:
            raise TransferError(f"NIXL cannot start: {error!r}") from error

    def progress(self) -> None:
        """Moves what peers read, and what connections need. Nobody sends notifications; no other call does this."""
        try:
            self.nixl.get_new_notifs()
        except Exception as error:  # noqa: BLE001
            _log.warning("transport.poll_failed", error=repr(error))

    def close(self) -> None:
        """Ends it for sure: the registrations, the connections, and all that may still arrive over them."""
        with suppress(Exception):
            for descriptors in self._registered:
                self.nixl.deregister_memory(descriptors)
        del self.nixl


@dataclass
class _Read:
    peer: str
    ranges: list[Range]
    memory_types: tuple[str, str]
    deadline_s: float
    answer: _Answer[int]
    handle: Any = None

    def release(self) -> None:
        """Frees what NIXL keeps for it."""
        with suppress(Exception):
            self.handle.release()
        self.handle = None


class NixlTransport:
    """`Transport` over NIXL with the UCX backend. Create it, and call all methods, from the event loop's thread.

    Args:
        name: of the agent; unique among all agents that ever meet (worker id and incarnation).
        arenas: regions to register.

    Raises:
        TransferError: NIXL has no UCX backend, or refuses the memory.
    """

    def __init__(self, name: str, arenas: Sequence[ArenaInfo]) -> None:
        # Not a SimpleQueue: its `get` waits for ever when its time is over before it waits (CPython 3.11).
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        self._reads: list[_Read] = []
        self._closing = False
        self._expects_readers = False
        self._lively_until_s = 0.0
        self._look_at_peers_s = 0.0
        self._name = name
        self._arenas = arenas
        self._lender = _Agent(name, arenas)
        self._peers: dict[str, _Agent] = {}
        self._connects = 0
        self._metadata: bytes = self._lender.nixl.get_agent_metadata()
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)
        self._thread.start()

    def metadata(self) -> bytes:
        return self._metadata

    def expect_readers(self, expected: bool) -> None:
        self._expects_readers = expected
        if expected:
            self._inbox.put(self._enliven)

    async def connect(self, metadata: bytes) -> str:
        return await self._in_thread(lambda: self._connect(metadata))

    def is_connected(self, peer: str) -> bool:
        return peer in self._peers

    async def disconnect(self, peer: str) -> None:
        await self._in_thread(lambda: self._drop(peer, TransferError(f"{peer} has been disconnected")))

    async def read(self, peer: str, ranges: list[Range], memory_types: tuple[str, str], timeout_s: float) -> int:
        self._check_open()
        read = _Read(peer, ranges, memory_types, time.monotonic() + timeout_s, _Answer())
        self._inbox.put(lambda: self._post(read))
        waiting = read.answer.future
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # the slabs must not be reused while bytes may still arrive: wait until the thread has ended the read
            read.deadline_s = time.monotonic()
            with suppress(ZipserveError):
                await _uncancelled(waiting)
            raise

    def close(self) -> None:
        self._closing = True
        self._inbox.put(lambda: None)
        self._thread.join()

    def _check_open(self) -> None:
        if self._closing:
            raise TransferError("the transport is closed")

    async def _in_thread(self, action: Callable[[], T]) -> T:
        self._check_open()
        answer = _Answer[T]()

        def act() -> None:
            if answer.future.cancelled():
                return  # nobody waits any more
            try:
                answer.give(action())
            except Exception as error:  # noqa: BLE001
                answer.fail(error)

        self._inbox.put(act)
        return await answer.future

    # Everything below runs in the transport's thread.

    def _run(self) -> None:
        while not self._closing:
            with suppress(queue.Empty):
                self._inbox.get(timeout=self._pause_s())()
            started_s = time.thread_time()
            self._lender.progress()
            if time.monotonic() >= self._look_at_peers_s:  # connections are made, and lost, without a read
                self._look_at_peers_s = time.monotonic() + _POLL_IDLE_S
                for agent in self._peers.values():
                    agent.progress()
            for read in self._reads[:]:
                if not read.answer.settled:  # another one of the same peer may have ended it
                    self._poll(read)
            if time.thread_time() - started_s > _MOVING_S:
                self._enliven()
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()  # somebody waits for the answer
        for peer in list(self._peers):
            self._drop(peer, TransferError("the transport is closing"))
        self._lender.close()

    def _pause_s(self) -> float:
        if not self._reads and not self._expects_readers:
            return _POLL_IDLE_S
        return _POLL_LIVELY_S if time.monotonic() < self._lively_until_s else _POLL_BUSY_S

    def _enliven(self) -> None:
        self._lively_until_s = time.monotonic() + _LIVELY_S

    def _connect(self, metadata: bytes) -> str:
        self._connects += 1
        agent = _Agent(f"{self._name}-reads-{self._connects}", self._arenas)
        try:
            name = agent.nixl.add_remote_agent(metadata)
            peer = name.decode() if isinstance(name, bytes) else str(name)
            agent.nixl.make_connection(peer)  # the first contact takes 30 ms: make it now
        except Exception as error:
            agent.close()
            raise TransferError(f"cannot connect to a peer: {error!r}") from error
        self._drop(peer, TransferError(f"{peer} has been connected again"))
        self._peers[peer] = agent
        return peer

    def _post(self, read: _Read) -> None:
        agent = self._peers.get(read.peer)
        if agent is None:
            read.answer.fail(TransferError(f"{read.peer} is not connected"))
            return
        self._reads.append(read)
        try:
            remote = [(r.remote_address, r.size_bytes, r.remote_device) for r in read.ranges]
            local = [(r.local_address, r.size_bytes, r.local_device) for r in read.ranges]
            read.handle = agent.nixl.initialize_xfer(
                "READ",
                agent.nixl.get_xfer_descs(local, read.memory_types[1]),
                agent.nixl.get_xfer_descs(remote, read.memory_types[0]),
                read.peer,
            )
            state = agent.nixl.transfer(read.handle)
            self._enliven()
        except Exception as error:  # noqa: BLE001
            self._drop(read.peer, TransferError(f"cannot read from {read.peer}: {error!r}"))
            return
        self._settle(read, state)

    def _poll(self, read: _Read) -> None:
        try:
            state = self._peers[read.peer].nixl.check_xfer_state(read.handle)
        except Exception as error:  # noqa: BLE001
            self._drop(read.peer, TransferError(f"lost {read.peer} while reading: {error!r}"))
            return
        self._settle(read, state)

    def _settle(self, read: _Read, state: str) -> None:
        if state == "DONE":
            self._finish(read)
        elif state != "PROC":
            self._drop(read.peer, TransferError(f"reading from {read.peer} failed"))
        elif time.monotonic() >= read.deadline_s + _GRACE_S:
            # ending a read drops the peer, and so all other reads from it: it gets the time to end by itself
            self._drop(read.peer, TransferError(f"{read.peer} did not deliver another read in time"))

    def _finish(self, read: _Read) -> None:
        try:
            moved_bytes = self._peers[read.peer].nixl.get_xfer_telemetry(read.handle).totalBytes
        except Exception as lost:  # noqa: BLE001
            self._drop(read.peer, TransferError(f"NIXL cannot say what it read from {read.peer}: {lost!r}"))
            return
        self._reads.remove(read)
        read.answer.give(moved_bytes)  # first: what follows is done while the event loop wakes up
        read.release()

    def _drop(self, peer: str, error: ZipserveError) -> None:
        """Forgets a peer, and ends all reads from it with an error.

        Its agent ends with it. NIXL closes a connection alone only behind what is under way on it: over TCP the slabs
        would still arrive.
        """
        agent = self._peers.pop(peer, None)
        if agent is None:
            return
        ended = [read for read in self._reads if read.peer == peer]
        self._reads = [read for read in self._reads if read.peer != peer]
        for read in ended:
            read.release()
        agent.close()
        for read in ended:
            late = DeadlineError(f"{peer} did not deliver {len(read.ranges)} slabs in time")
            read.answer.fail(late if time.monotonic() >= read.deadline_s else error)


async def _uncancelled(waiting: "asyncio.Future[int]") -> None:
    """Awaits although the task is cancelled again and again."""
    while not waiting.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(waiting)
