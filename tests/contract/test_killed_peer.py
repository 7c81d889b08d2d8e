"""A prefill worker that is killed between its answer and the pull, as a real process over real NIXL."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from inprocess import SECRET
from polling import until
from workers import BLOCK, Decode, claims_of, prompt, workers
from zipserve.common import errors
from zipserve.common.registry import WorkerRecord
from zipserve.common.rpc.status import client_errors
from zipserve.common.transfer import held_lease, puller
from zipserve.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse
from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceStub

READY_TIMEOUT_S = 60.0


@dataclass
class Process:
    """One life of `python -m zipserve.prefill`."""

    process: subprocess.Popen[bytes]
    address: str

    async def known(self, decode: Decode) -> WorkerRecord:
        """Returns when the decode worker knows this life."""
        view = decode.service.peers.registry
        assert view is not None

        def record() -> WorkerRecord | None:
            found = view.find("prefill-0")
            return found if found is not None and found.capabilities.address == self.address else None

        await until(lambda: record() is not None, "the decode worker knows it")
        found = record()
        assert found is not None
        return found

    async def compute(self, decode: Decode, tokens: list[int]) -> PrefillResponse:
        facts = (await self.known(decode)).capabilities
        request = PrefillRequest(
            request_id="r",
            token_ids=tokens,
            sampling=decode.request(PrefillResponse()).sampling,
            layout_fingerprint=facts.writable_layout,
        )
        stub = PrefillServiceStub(decode.channels.get(self.address))
        with client_errors():
            return await stub.Prefill(request, timeout=20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@asynccontextmanager
async def prefill_process(decode: Decode, model: Path, log_path: Path) -> AsyncIterator[Process]:
    """A process that the decode worker knows; killed in the end."""
    settings = {
        "WORKER_ID": "prefill-0",
        "MODEL": str(model),
        "REDIS_URL": decode.settings.redis_url,
        "CLUSTER": decode.settings.cluster,
        "SECRET": SECRET,
        "CODEC": "raw",
        "BLOCK_TOKENS": str(BLOCK),
        "KV_BLOCKS": "24",
        "KV_TAILS": "6",
        "HEARTBEAT_S": "0.1",
        "REGISTRY_TTL_S": "5",
        "THREADS": "1",
    }
    process = _spawn(settings, log_path)
    try:
        await until(lambda: _address(log_path) != "" or process.poll() is not None, "it is ready", READY_TIMEOUT_S)
        assert process.poll() is None, f"see {log_path}"
        started = Process(process, _address(log_path))
        await started.known(decode)
        yield started
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def _spawn(settings: dict[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **{f"ZIPSERVE_PREFILL_{name}": text for name, text in settings.items()}}
    with log_path.open("wb") as log:
        return subprocess.Popen([sys.executable, "-P", "-m", "zipserve.prefill"], env=environment, stderr=log)


def _address(log_path: Path) -> str:
    ready = [line for line in log_path.read_text().splitlines() if '"service.ready"' in line]
    return str(json.loads(ready[-1])["address"]) if ready else ""


async def works(decode: Decode, process: Process, salt: int) -> None:
    prefilled = await process.compute(decode, prompt(40, salt))
    assert len(await decode.tokens(prefilled)) == 8


async def fails_soon(decode: Decode, prefilled: PrefillResponse, within_s: float = 5.0) -> errors.ZipserveError:
    """The error is one after which the router prefills elsewhere."""
    started_s = time.monotonic()
    with pytest.raises(errors.ZipserveError) as raised:
        await decode.events(prefilled)
    assert time.monotonic() - started_s < within_s
    assert raised.value.replayable
    await decode.settled()
    return raised.value


@pytest.mark.slow
async def test_killed_stopped_and_started_again(
    tiny_model: Path, redis_url: str, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (held_lease, puller):
        monkeypatch.setattr(module, "_RPC_TIMEOUT_S", 2.0)  # for the hang at the end; what is killed must not need it
    async with workers(tiny_model, redis_url, cluster) as started:
        decode = await started.decode()
        async with prefill_process(decode, tiny_model, tmp_path / "first.log") as first:
            await works(decode, first, 1)
            lost = await first.compute(decode, prompt(40, 2))
            first.kill()
            await fails_soon(decode, lost)
            await fails_soon(decode, lost)  # again: the agent is gone by now
        async with prefill_process(decode, tiny_model, tmp_path / "second.log") as second:
            raised = await fails_soon(decode, lost)
            assert type(raised) is errors.IncarnationError
            await works(decode, second, 3)
            await asyncio.gather(*(works(decode, second, salt) for salt in range(4, 7)))
            # a process that hangs confirms no lease, but its slabs are still there, and what they hold is verified
            hung, expected = [await second.compute(decode, prompt(40, 8)) for _ in range(2)]
            assert claims_of(hung.handle).incarnation != claims_of(lost.handle).incarnation
            tokens = await decode.tokens(expected)
            second.process.send_signal(signal.SIGSTOP)
            assert await decode.tokens(hung) == tokens
            second.process.send_signal(signal.SIGCONT)
            await second.known(decode)
            await works(decode, second, 9)
