"""The supervisor with real processes: small scripts that report over a socket, which also tells when they are gone."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio as redis
from redis.exceptions import AuthenticationError

from zipserve.cli import redis_server
from zipserve.cli.plan import ChildSpec
from zipserve.cli.readiness import redis_ready
from zipserve.cli.restart import RestartPolicy
from zipserve.cli.supervisor import Death, Supervisor
from zipserve.cli.watchdog import Watchdog

# argv: socket, name, what to do on SIGTERM. Says hello, then waits for an exit status or for a signal.
CHILD = """
import os, signal, socket, sys
path, name, on_term = sys.argv[1:]
line = socket.socket(socket.AF_UNIX)
line.connect(path)
def term(*_):
    line.sendall(b"term\\n")
    if on_term != "ignore":
        sys.exit(int(on_term))
signal.signal(signal.SIGTERM, term)
print("hello from", name, flush=True)
line.sendall(f"{name} {os.getpid()} {os.getpgrp()} {os.environ.get('EXTRA', '')}\\n".encode())
while True:
    data = line.recv(16)
    sys.exit(int(data) if data else 0)
"""
QUICK = RestartPolicy(delay_first_s=0.01, delay_max_s=0.02, deaths_max=3, start_deaths_max=3)
SOON_S = 10.0


class Life:
    """One connection of a child: its hello, and the way to tell it how to exit."""

    def __init__(self, hello: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name, pid, group, self.extra = hello.rstrip("\n").split(" ")
        self.pid, self.group = int(pid), int(group)
        self._reader = reader
        self.writer = writer

    def exit(self, status: int) -> None:
        self.writer.write(str(status).encode())

    async def said(self) -> str:
        """The next line; empty once the process is gone."""
        try:
            return (await asyncio.wait_for(self._reader.readline(), SOON_S)).decode()
        except ConnectionResetError:
            return ""


class Lives:
    """Listens for children."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "socket"
        self.script = folder / "child.py"
        self._queue: asyncio.Queue[Life] = asyncio.Queue()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._queue.put_nowait(Life((await reader.readline()).decode(), reader, writer))

    async def next(self) -> Life:
        return await asyncio.wait_for(self._queue.get(), SOON_S)

    def spec(self, name: str, on_term: str = "0", stop_rank: int = 0) -> ChildSpec:
        command = (sys.executable, "-I", "-S", str(self.script), str(self.path), name, on_term)
        return ChildSpec(name, "test", command, {"EXTRA": f"for-{name}"}, stop_rank=stop_rank)


@pytest.fixture
async def lives(tmp_path: Path) -> AsyncIterator[Lives]:
    lives = Lives(tmp_path)
    lives.script.write_text(CHILD)
    connected: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)
        await lives.accept(reader, writer)

    async with await asyncio.start_unix_server(accept, lives.path):
        yield lives
        for writer in connected:
            writer.close()


@asynccontextmanager
async def _supervisor(
    folder: Path, deaths: list[Death], stop_s: float = SOON_S, policy: RestartPolicy = QUICK
) -> AsyncIterator[Supervisor]:
    async with asyncio.timeout(3 * SOON_S):
        async with Supervisor(folder, deaths.append, policy=policy, stop_s=stop_s) as supervisor:
            yield supervisor


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_child_that_dies_is_started_again(tmp_path: Path, lives: Lives) -> None:
    deaths: list[Death] = []
    async with _supervisor(tmp_path, deaths) as supervisor:
        child = supervisor.start(lives.spec("a"))
        first = await lives.next()
        assert first.extra == "for-a"
        assert first.group != os.getpgrp()  # Ctrl-C in the terminal does not reach it
        child.address = "known"
        first.exit(3)
        second = await lives.next()
        assert second.pid != first.pid
        assert child.lives == 2
        assert not child.ready
        assert (deaths[0].pid, deaths[0].how) == (first.pid, "exited with status 3")
        assert deaths[0].log_tail == ["hello from a"]
        assert deaths[0].restart_in_s == pytest.approx(0.01)
        os.kill(second.pid, signal.SIGKILL)
        third = await lives.next()
        assert deaths[1].how == "was killed by SIGKILL"
        assert not supervisor.failure
    assert await third.said() == "term\n"
    assert [_exists(life.pid) for life in (first, second, third)] == [False] * 3
    assert supervisor.unclean == []


async def test_a_child_that_keeps_dying_is_given_up(tmp_path: Path, lives: Lives) -> None:
    deaths: list[Death] = []
    async with _supervisor(tmp_path, deaths) as supervisor:
        supervisor.start(lives.spec("bad"))
        supervisor.start(lives.spec("good"))
        pids = []
        for _ in range(4):
            life = await lives.next()
            pids.append(life.pid)
            if life.name == "bad":
                life.exit(7)
        await supervisor.failed()
        assert supervisor.failure == "bad exited with status 7, 3 times in a row"
    assert [death.restart_in_s is None for death in deaths] == [False, False, True]
    assert not any(map(_exists, pids))


async def test_children_are_stopped_rank_by_rank(tmp_path: Path, lives: Lives) -> None:
    async with _supervisor(tmp_path, []) as supervisor:
        for rank, name in enumerate(("router", "worker", "redis")):
            supervisor.start(lives.spec(name, on_term="ignore", stop_rank=rank))
        found = {life.name: life for life in [await lives.next() for _ in range(3)]}
        stopping = asyncio.create_task(supervisor.stop())
        for name in ("router", "worker", "redis"):
            assert await found[name].said() == "term\n"
            assert all(_exists(life.pid) for life in found.values())
            found.pop(name).exit(0)
        await stopping
    assert supervisor.unclean == []
    assert supervisor.deaths == 0


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, lives: Lives) -> None:
    async with _supervisor(tmp_path, [], stop_s=0.05) as supervisor:
        supervisor.start(lives.spec("stubborn", on_term="ignore"))
        life = await lives.next()
    assert not _exists(life.pid)
    assert supervisor.unclean == ["stubborn did not stop in time and was killed"]


async def test_hurrying_ends_the_wait(tmp_path: Path, lives: Lives) -> None:
    async with _supervisor(tmp_path, [], stop_s=1000.0) as supervisor:
        supervisor.start(lives.spec("stubborn", on_term="ignore"))
        life = await lives.next()
        stopping = asyncio.create_task(supervisor.stop())
        assert await life.said() == "term\n"
        supervisor.hurry()
        await stopping
    assert not _exists(life.pid)


async def test_a_bad_exit_while_stopping_is_told(tmp_path: Path, lives: Lives) -> None:
    async with _supervisor(tmp_path, []) as supervisor:
        supervisor.start(lives.spec("a", on_term="5"))
        await lives.next()
    assert supervisor.unclean == ["a exited with status 5 while stopping"]


async def test_stopping_does_not_wait_for_a_restart(tmp_path: Path, lives: Lives) -> None:
    deaths: asyncio.Queue[Death] = asyncio.Queue()
    policy = RestartPolicy(delay_first_s=1000.0, delay_max_s=1000.0)
    async with asyncio.timeout(SOON_S), Supervisor(tmp_path, deaths.put_nowait, policy=policy) as supervisor:
        supervisor.start(lives.spec("a"))
        (await lives.next()).exit(1)
        assert (await deaths.get()).restart_in_s == 1000.0
    assert supervisor.unclean == []


async def test_a_missing_program_is_a_failure(tmp_path: Path) -> None:
    async with _supervisor(tmp_path, []) as supervisor:
        supervisor.start(ChildSpec("ghost", "test", ("/does/not/exist",)))
        await supervisor.failed()
    assert supervisor.failure.startswith("ghost cannot be started: ")


async def test_a_lost_watchdog_is_a_failure(tmp_path: Path, lives: Lives) -> None:
    async with _supervisor(tmp_path, []) as supervisor:
        supervisor.start(lives.spec("a"))
        life = await lives.next()
        os.kill(life.group, signal.SIGKILL)  # the watchdog leads the group
        await supervisor.failed()
        assert supervisor.failure == "the watchdog was killed by SIGKILL"
    assert not _exists(life.pid)


SUPERVISING = """
import asyncio, sys
from pathlib import Path
from zipserve.cli.plan import ChildSpec
from zipserve.cli.supervisor import Supervisor
from zipserve.cli.watchdog import Watchdog

async def main():
    folder, script, path = sys.argv[1:]
    async with Supervisor(Path(folder), print) as supervisor:
        for name, on_term in (("polite", "0"), ("stubborn", "ignore")):
            supervisor.start(ChildSpec(name, "test", (sys.executable, "-I", "-S", script, path, name, on_term)))
        await supervisor.failed()

Watchdog.__init__.__defaults__ = (0.2,)  # a short grace
asyncio.run(main())
"""


async def test_nothing_is_left_behind_by_a_supervisor_that_is_killed(tmp_path: Path, lives: Lives) -> None:
    script = tmp_path / "supervising.py"
    script.write_text(SUPERVISING)
    command = [sys.executable, "-P", str(script), str(tmp_path), str(lives.script), str(lives.path)]
    supervising = await asyncio.create_subprocess_exec(*command)
    found = {life.name: life for life in [await lives.next(), await lives.next()]}
    supervising.kill()
    await supervising.wait()
    for life in found.values():
        assert await life.said() == "term\n"  # politely first
        assert await life.said() == ""  # then for good


def test_the_watchdog_ends_its_whole_group() -> None:
    with Watchdog(grace_s=0.1) as watchdog:
        # has no part in the supervisor's bookkeeping, as a grandchild has none
        stray = subprocess.Popen(["sleep", "1000"], process_group=watchdog.process.pid)
    assert stray.wait(SOON_S) == -signal.SIGTERM
    assert watchdog.process.returncode == -signal.SIGKILL


async def test_embedded_redis_needs_its_password(tmp_path: Path, unused_tcp_port: int) -> None:
    url = redis_server.url(unused_tcp_port, "right")
    async with _supervisor(tmp_path, []) as supervisor:
        child = supervisor.start(redis_server.spec(unused_tcp_port, "right", tmp_path))
        while not await redis_ready(url):
            assert not supervisor.failure
        assert child.process is not None
        assert not await redis_ready(redis_server.url(unused_tcp_port, "wrong"))
        anonymous = redis.Redis.from_url(f"redis://127.0.0.1:{unused_tcp_port}/0")
        with pytest.raises(AuthenticationError):
            await anonymous.ping()
        await anonymous.aclose()
        client = redis.Redis.from_url(url, decode_responses=True)
        assert (await client.config_get("bind", "save", "appendonly")) == {
            "bind": "127.0.0.1", "save": "", "appendonly": "no",
        }  # fmt: skip
        await client.aclose()
        assert "right" not in " ".join(child.spec.command) + repr(child.spec)
        pid = child.process.pid
    assert not _exists(pid)
    assert supervisor.unclean == []
    assert os.listdir(tmp_path) == ["redis.log"]
