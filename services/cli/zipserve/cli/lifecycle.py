"""One run of a stack: from the first process, over readiness and the work, to the last process."""

import asyncio
import os
import signal
import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipserve.cli import generate, plan
from zipserve.cli.answer import Answer
from zipserve.cli.console import Console, obituary, progress, summary
from zipserve.cli.parser import DEFAULT_ADDRESS, DEFAULT_PROMPT
from zipserve.cli.readiness import Readiness, UpSettings, redis_ready
from zipserve.cli.supervisor import Child, Death, Supervisor
from zipserve.client import Client
from zipserve.common.errors import ZipserveError

_KILL_MARGIN_S = 5.0
_ONCE_TIMEOUT_S = 300.0
_STILL_WAITING_S = 15.0
_PROMPT_CHARACTERS = 200
_INTERRUPTED = 128 + signal.SIGINT


class _NotStarted(Exception):
    """Not everything was ready in time."""


@dataclass(frozen=True)
class Once:
    """The one prompt after which the stack is stopped."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Setup:
    """Everything that is fixed before the first process starts."""

    stack: plan.Stack
    redis: plan.ChildSpec | None
    """None: somebody else's is used."""
    log_dir: Path
    start_timeout_s: float
    router: str
    """host:port under which this machine reaches the router."""
    http: str
    """The same of its HTTP API; empty: there is none."""
    once: Once | None


class Lifecycle:
    """Runs a stack; use it once."""

    def __init__(self, setup: Setup, console: Console) -> None:
        self._setup = setup
        self._console = console
        self._begun_s = time.monotonic()
        self._started = False
        self._interrupted = asyncio.Event()
        stack = setup.stack
        settings = UpSettings.model_validate(
            {"cluster": stack.cluster, "redis_url": stack.redis_url, "secret": stack.secret}
        )
        self._supervisor = Supervisor(setup.log_dir, self._tell_death, stop_s=stack.drain_s + _KILL_MARGIN_S)
        self._readiness = Readiness(settings, setup.router, self._tell_ready)

    async def run(self) -> int:
        """Returns the exit status: 0, 1 when anything failed, 130 when interrupted before the work was done."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt)
        try:
            async with self._supervisor:
                try:
                    status = await self._until_over()
                finally:
                    self._console.status("")
                    self._console.line("stopping")
        finally:
            for problem in self._supervisor.unclean:
                self._console.line(problem)
        failed = self._supervisor.unclean or (self._setup.once and self._supervisor.deaths)
        return status or int(bool(failed))

    async def _until_over(self) -> int:
        """Runs until the work is done, something has failed, or a signal came."""
        async with self._readiness:
            work = asyncio.create_task(self._work())
            watching = asyncio.create_task(self._readiness.watch(self._supervisor.children))
            failed = asyncio.create_task(self._supervisor.failed())
            interrupted = asyncio.create_task(self._interrupted.wait())
            tasks: tuple[asyncio.Task[Any], ...] = (work, watching, failed, interrupted)
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return self._outcome(work)
                if watching.done():
                    watching.result()
                if failed.done():
                    self._console.line(f"zipserve: {self._supervisor.failure}")
                    return 1
                return 0 if self._started and self._setup.once is None else _INTERRUPTED
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _outcome(self, work: "asyncio.Task[None]") -> int:
        try:
            work.result()
        except _NotStarted as error:
            self._console.line(f"zipserve: {error}")
        except ZipserveError as error:
            self._console.line(generate.explain(error))
        else:
            return 0
        return 1

    async def _work(self) -> None:
        try:
            async with asyncio.timeout(self._setup.start_timeout_s):
                await self._start()
        except TimeoutError:
            waiting = ", ".join(name for name, child in self._supervisor.children.items() if not child.ready)
            raise _NotStarted(
                f"not ready after {self._setup.start_timeout_s:g} s: {waiting or 'the router, which sees no workers'}"
            ) from None
        self._tell_started()
        if self._setup.once is not None:
            await self._ask(self._setup.once)
        else:
            await self._interrupted.wait()

    async def _start(self) -> None:
        setup = self._setup
        if setup.redis is not None:
            self._supervisor.start(setup.redis)
        elif not await redis_ready(setup.stack.redis_url):
            where = setup.stack.redis_url.rpartition("@")[2].removeprefix("redis://")
            raise _NotStarted(f"Redis does not answer on {where}")
        await self._readiness.open()
        for spec in plan.children(setup.stack, len(os.sched_getaffinity(0))):
            self._supervisor.start(spec)
        await self._all_ready()
        await self._readiness.models_served()
        self._console.status("")

    async def _all_ready(self) -> None:
        children = self._supervisor.children
        told_s = time.monotonic()
        while waiting := [name for name, child in children.items() if not child.ready]:
            now_s = time.monotonic()
            self._console.status(progress(children.values(), now_s - self._begun_s))
            if not self._console.is_terminal and now_s - told_s > _STILL_WAITING_S:
                told_s = now_s
                self._console.line(f"{self._elapsed()} waiting for {', '.join(waiting)}")
            await self._readiness.looked()

    async def _ask(self, once: Once) -> None:
        self._console.line(f"> {textwrap.shorten(once.prompt, _PROMPT_CHARACTERS, placeholder=' …')}")
        with Client(self._setup.router) as client:
            answer = Answer(time.monotonic())
            stream = client.generate(
                generate.conversation(None, once.prompt),
                max_tokens=once.max_tokens,
                temperature=0.0,
                timeout_s=_ONCE_TIMEOUT_S,
            )
            receiving = asyncio.create_task(asyncio.to_thread(generate.receive, stream, [answer], generate.write))
            try:
                await asyncio.shield(receiving)
            finally:
                stream.close()  # which ends the thread, should we be the ones who are cancelled
                with suppress(ZipserveError):
                    await receiving
                generate.write("\n")
        for line in answer.statistics():
            self._console.line(line)

    def _interrupt(self) -> None:
        if self._interrupted.is_set():
            self._console.line("killing what is left")
            self._supervisor.hurry()
        self._interrupted.set()

    def _tell_ready(self, child: Child) -> None:
        if not self._console.is_terminal or self._started:
            again = " again" if child.lives > 1 else ""
            self._console.line(f"{self._elapsed()} {child.spec.name} is ready{again} ({child.address})")

    def _tell_death(self, death: Death) -> None:
        self._readiness.forget(death.child.spec.name)
        for line in obituary(death):
            self._console.line(line)

    def _tell_started(self) -> None:
        self._started = True
        router = self._setup.router
        self._console.line(f"ready after {time.monotonic() - self._begun_s:.1f} s, router on {router}")
        for line in summary(self._supervisor.children.values()):
            self._console.line(line)
        if self._setup.once is None:
            address = "" if router == DEFAULT_ADDRESS else f" --address {router}"
            self._console.line(f'  zipserve generate{address} "{DEFAULT_PROMPT}"')
            if self._setup.http:
                self._console.line(f"  OpenAI API: http://{self._setup.http}/v1")
            self._console.line(f"  zipserve top --log-dir {self._setup.log_dir}")
            self._console.line("Ctrl-C stops everything; once more kills what is left")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begun_s:6.1f} s"
