"""`zipserve up` as a process of its own, over stand-ins for the services: real Redis, registry, gRPC and signals."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from zipserve.cli.__main__ import main

# argv: service, settings. A service that serves nothing but, as a router, a canned answer.
STAND_IN = """
import secrets, sys
from pydantic_settings import SettingsConfigDict
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.server import run
from zipserve.common.rpc.door import Entrance
from zipserve.common.settings import ServiceSettings
from zipserve.router.access.keyring import KeyRing
from zipserve.v1 import inference_service_pb2 as pb
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

service = sys.argv.pop(1)

class Settings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix=f"ZIPSERVE_{service.upper()}_")
    model: str = ""
    http_listen: str = ""
    threads: int = 0
    broken: bool = False

class Inference(InferenceServiceServicer):
    async def Generate(self, request, context):
        assert request.sampling.HasField("temperature") and request.sampling.temperature == 0
        yield pb.GenerateResponse(started=pb.Started(request_id="r", prompt_tokens=3))
        yield pb.GenerateResponse(delta=pb.Delta(token_ids=[1, 2], text=request.chat.messages[0].content.upper()))
        transfer = pb.KvTransfer(bytes=2048, blocks=4, tokens=5)
        yield pb.GenerateResponse(finished=pb.Finished(kv_transfer=transfer))

    async def ListModels(self, request, context):
        return pb.ListModelsResponse(models=[pb.Model(id="tiny")])

class StandIn:
    def __init__(self, settings):
        self.settings, self.metrics, self.incarnation = settings, Metrics(), secrets.randbits(64)

    async def start(self, address):
        self.address = address
        if self.settings.broken:
            raise ValueError("broken on purpose")

    def add_to(self, server):
        add_InferenceServiceServicer_to_server(Inference(), server)
        return ["zipserve.v1.InferenceService"]

    def entrance(self):
        return Entrance(KeyRing(None), None) if service == "router" else None

    def capabilities(self):
        if service == "router":
            return None
        role = WorkerRole.Value(f"WORKER_ROLE_{service.upper()}")
        return Capabilities(
            worker_id=self.settings.worker_id, incarnation=self.incarnation, role=role, address=self.address
        )

    def load(self):
        return Load()

    def begin_drain(self):
        pass

    def loops(self):
        return []

    async def drained(self):
        pass

    async def close(self):
        pass

settings = Settings.load()
run(service, StandIn(settings), settings)
"""
DRIVER = """
import sys
from pathlib import Path
from zipserve.cli import plan
from zipserve.cli.__main__ import main
from zipserve.common import models

stand_in, *arguments = sys.argv[1:]
plan.service_command = lambda service: [sys.executable, "-P", stand_in, service]
models.resolve = lambda model: models.ModelFiles("tiny", Path("/nowhere"), "0" * 64)
sys.exit(main(arguments))
"""
SOON_S = 60.0


class Up:
    """A running `zipserve up`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.told = ""

    async def until(self, pattern: str) -> "re.Match[str]":
        """Reads what it tells, line by line, up to a line that matches."""
        assert self.process.stderr is not None
        while line := (await self.process.stderr.readline()).decode():
            self.told += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern!r} never came:\n{self.told}")

    async def end(self) -> tuple[int, str]:
        """Exit status and stdout, once it has ended."""
        out, err = await self.process.communicate()
        self.told += err.decode()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode()

    def pids(self) -> dict[str, int]:
        """By process, from the table that it tells."""
        return {name: int(pid) for name, pid in re.findall(r"^  ([a-z]\S*) +\S+ +(\d+) +/", self.told, re.MULTILINE)}


@asynccontextmanager
async def _up(folder: Path, *arguments: str) -> AsyncIterator[Up]:
    stand_in, driver = folder / "stand_in.py", folder / "driver.py"
    stand_in.write_text(STAND_IN)
    driver.write_text(DRIVER)
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-P", str(driver), str(stand_in), "up", "--log-dir", str(folder / "logs"), *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(SOON_S):
        yield Up(process)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_once_answers_one_prompt_and_stops_everything(tmp_path: Path) -> None:
    async with _up(tmp_path, "--once", "--prompt", "hello") as up:
        status, out = await up.end()
    assert (status, out) == (0, "HELLO\n"), up.told
    assert "TTFT " in up.told
    assert "KV over NIXL: 2048 bytes (2.0 KiB), 4 blocks, 5 tokens" in up.told
    pids = up.pids()
    assert list(pids) == ["redis", "router", "prefill-0", "decode-0", "kvstore-0"]
    assert not any(map(_exists, pids.values()))
    assert sorted(os.listdir(tmp_path / "logs")) == sorted(f"{name}.log" for name in pids)
    drained = (tmp_path / "logs/decode-0.log").read_text()
    assert "service.drained" in drained


async def test_up_restarts_a_killed_worker_and_redis_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    async with _up(tmp_path, "--listen", "127.0.0.1:0") as up:
        await up.until(r"OpenAI API: http://127\.0\.0\.1:\d+/v1$")
        await up.until("Ctrl-C stops everything")
        pids = up.pids()
        assert len(pids) == 5
        os.kill(pids["prefill-0"], signal.SIGKILL)
        await up.until(rf"prefill-0 \(pid {pids['prefill-0']}\) was killed by SIGKILL after .*: starts again")
        await up.until("prefill-0 is ready again")
        os.kill(pids["redis"], signal.SIGKILL)
        await up.until("redis is ready again")
        up.process.send_signal(signal.SIGINT)
        status, out = await up.end()
    assert (status, out) == (0, ""), up.told
    assert not any(map(_exists, pids.values()))


async def test_up_gives_up_a_service_that_cannot_start(tmp_path: Path) -> None:
    async with _up(tmp_path, "--once", "--set", "kvstore.broken=true") as up:
        status, out = await up.end()
    assert (status, out) == (1, ""), up.told
    assert "kvstore-0 | ValueError: broken on purpose" in up.told
    assert "zipserve: kvstore-0 exited with status 1, 2 times in a row" in up.told
    assert f"logs are kept in {tmp_path / 'logs'}" in up.told


async def test_up_tells_that_a_given_redis_does_not_answer(tmp_path: Path, unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}/0"
    async with _up(tmp_path, "--listen", "127.0.0.1:0", "--redis", f"redis://:password@{address}") as up:
        status, _ = await up.end()
    assert status == 1
    assert f"zipserve: Redis does not answer on {address}\n" in up.told
    assert "password" not in up.told


def test_up_refuses_an_address_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for option in ("--listen", "--http"):
            assert main(["up", "--once", option, address]) == 1
            assert f"zipserve: cannot listen on {address}: Address already in use" in capsys.readouterr().err


def test_up_has_a_prompt_only_with_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--prompt", "x"]) == 2
    assert "need --once" in capsys.readouterr().err
