"""Keeps a set of processes running: starts them, starts a dead one again, stops all of them in order.

Whatever happens to the supervisor itself, no process is left behind: see `zipserve.cli.watchdog`.
"""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zipserve.cli.logtail import tail
from zipserve.cli.plan import ChildSpec
from zipserve.cli.restart import RestartPolicy, Restarts, describe_exit
from zipserve.cli.watchdog import Watchdog

_TAIL_LINES = 12
_KILLED_WAIT_S = 5.0


class Child:
    """One process and, after restarts, its successors."""

    def __init__(self, spec: ChildSpec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        """The present life; None between two lives."""
        self.lives = 0
        self.started_at_s = 0.0
        self.address = ""
        """Where it answers; empty until it is ready."""

    @property
    def ready(self) -> bool:
        """Whether the present life has been found ready."""
        return bool(self.address)


@dataclass(frozen=True)
class Death:
    """A process ended that should not have."""

    child: Child
    pid: int
    how: str
    lived_s: float
    log_tail: list[str]
    restart_in_s: float | None
    """None: it is given up, and the supervisor has failed."""


class Supervisor:
    """Runs children while the context is open; leaving it stops them all."""

    def __init__(
        self,
        log_dir: Path,
        on_death: Callable[[Death], None],
        *,
        policy: RestartPolicy | None = None,
        stop_s: float = 15.0,
    ) -> None:
        self._log_dir = log_dir
        self._on_death = on_death
        self._policy = policy or RestartPolicy()
        self._stop_s = stop_s
        self._watchdog = Watchdog()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watchdog_ended: asyncio.Task[None] | None = None
        self._failed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self.children: dict[str, Child] = {}
        self.deaths = 0
        """Unexpected ones, over all children."""
        self.failure = ""
        """Why the supervisor gave up."""
        self.unclean: list[str] = []
        """What went wrong while stopping, one sentence each."""

    async def __aenter__(self) -> "Supervisor":
        self._watchdog.__enter__()
        self._watchdog_ended = asyncio.create_task(self._guard_watchdog(), name="watchdog")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def start(self, spec: ChildSpec) -> Child:
        """Starts a child and keeps it running. Its output is appended to `<log_dir>/<name>.log`."""
        child = Child(spec, self._log_dir / f"{spec.name}.log")
        self.children[spec.name] = child
        task = asyncio.create_task(self._keep(child), name=spec.name)
        task.add_done_callback(self._check)
        self._tasks[spec.name] = task
        return child

    async def failed(self) -> None:
        """Returns once a child has been given up; `failure` says why."""
        await self._failed.wait()

    def hurry(self) -> None:
        """Kills what is still running as soon as everything is being stopped."""
        self._hurry.set()

    async def stop(self) -> None:
        """Stops all children, rank by rank: SIGTERM, a bounded wait, SIGKILL. Safe to call again."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        for rank in sorted({child.spec.stop_rank for child in self.children.values()}):
            await self._stop_wave([child for child in self.children.values() if child.spec.stop_rank == rank])
        await asyncio.to_thread(self._watchdog.__exit__, None, None, None)
        assert self._watchdog_ended is not None
        await self._watchdog_ended

    async def _stop_wave(self, wave: list[Child]) -> None:
        for child in wave:
            _signal(child, signal.SIGTERM)
        ended = asyncio.gather(*(self._tasks[child.spec.name] for child in wave), return_exceptions=True)
        hurry = asyncio.ensure_future(self._hurry.wait())
        waits: set[asyncio.Future[Any]] = {ended, hurry}
        await asyncio.wait(waits, timeout=self._stop_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        for child in wave:
            if child.process is not None:
                _signal(child, signal.SIGKILL)
                self.unclean.append(f"{child.spec.name} did not stop in time and was killed")
        await asyncio.wait({ended}, timeout=_KILLED_WAIT_S)

    async def _keep(self, child: Child) -> None:
        restarts = Restarts(self._policy)
        while not self._stopping.is_set():
            try:
                offset = self._spawn(child)
            except OSError as error:
                self._fail(f"{child.spec.name} cannot be started: {error}")
                return
            assert child.process is not None
            process = child.process
            code = await _ended(process)
            was_ready = child.ready
            child.process, child.address = None, ""
            if self._stopping.is_set():
                if code not in (0, -signal.SIGTERM, -signal.SIGKILL):
                    self.unclean.append(f"{child.spec.name} {describe_exit(code)} while stopping")
                return
            lived_s = time.monotonic() - child.started_at_s
            delay_s = restarts.after_death(lived_s, was_ready=was_ready)
            self.deaths += 1
            log_tail = tail(child.log, offset, _TAIL_LINES)
            self._on_death(Death(child, process.pid, describe_exit(code), lived_s, log_tail, delay_s))
            if delay_s is None:
                self._fail(f"{child.spec.name} {describe_exit(code)}, {restarts.deaths} times in a row")
                return
            await _sleep_unless(self._stopping, delay_s)

    def _spawn(self, child: Child) -> int:
        """Starts a life; returns where its log begins."""
        spec = child.spec
        with child.log.open("ab") as log:
            offset = log.tell()
            child.process = subprocess.Popen(
                spec.command,
                stdin=subprocess.PIPE if spec.stdin else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                pass_fds=(self._watchdog.life_fd,),
                process_group=self._watchdog.process.pid,
            )
        child.lives += 1
        child.started_at_s = time.monotonic()
        if child.process.stdin is not None:
            _feed(child.process.stdin, spec.stdin.encode())
        return offset

    async def _guard_watchdog(self) -> None:
        code = await _ended(self._watchdog.process)
        if not self._stopping.is_set():
            self._fail(f"the watchdog {describe_exit(code)}")

    def _check(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._fail(f"{task.get_name()} is no longer looked after: {error!r}")

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._failed.set()


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None:
        child.process.send_signal(number)


def _feed(pipe: IO[bytes], data: bytes) -> None:
    # when the process has died already, that is told elsewhere
    with suppress(BrokenPipeError), pipe:
        pipe.write(data)


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Waits in a thread of its own: unlike asyncio's, Popen's bookkeeping allows to send signals meanwhile."""
    loop = asyncio.get_running_loop()
    code: asyncio.Future[int] = loop.create_future()

    def tell(value: int) -> None:
        if not code.done():
            code.set_result(value)

    def wait() -> None:
        value = process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(tell, value)

    threading.Thread(target=wait, daemon=True, name=f"wait-{process.pid}").start()
    return await code


async def _sleep_unless(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
