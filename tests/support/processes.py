"""Real services as real processes, one by one, so that a test can start, drain and kill each of them."""

import os
import signal
import subprocess
from pathlib import Path

from polling import until
from zipserve.cli import plan
from zipserve.common.registry import RegistryView, WorkerRecord
from zipserve.common.settings import ServiceSettings
from zipserve.v1.worker_service_pb2 import WorkerRole

READY_TIMEOUT_S = 90.0
SECRET = "a secret of the integration tests"


class Processes:
    """A cluster of processes; an async context manager that leaves none behind."""

    def __init__(
        self,
        redis_url: str,
        model: Path | str,
        log_dir: Path,
        *,
        cluster: str,
        codec: str = "raw",
        threads: int = 1,
        overrides: tuple[tuple[str, str, str], ...] = (),
    ) -> None:
        self._log_dir = log_dir
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = plan.Stack(
            prefill=4,
            decode=4,
            model=str(model),
            listen="127.0.0.1:0",
            cluster=cluster,
            redis_url=redis_url,
            secret=SECRET,
            drain_s=20.0,
            codec=codec,
            threads=threads,
            overrides=overrides,
        )
        self.settings = ServiceSettings.model_validate(
            {"cluster": cluster, "redis_url": redis_url, "secret": SECRET, "heartbeat_s": 0.2}
        )
        self.view = RegistryView(self.settings)
        self.router = ""
        """host:port, once the router is ready."""

    async def __aenter__(self) -> "Processes":
        await self.view.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._running.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in self._running.values():
            process.wait()
        await self.view.__aexit__()

    async def start(self, *names: str) -> None:
        """Starts processes (`router`, `prefill-0`, `decode-1` …) and waits until they are ready."""
        specs = {spec.name: spec for spec in plan.children(self._stack, cores=2)}
        for name in names:
            log = (self._log_dir / f"{name}.log").open("ab")
            environment = {**os.environ, **specs[name].environment}
            self._running[name] = subprocess.Popen(specs[name].command, env=environment, stderr=log)  # noqa: ASYNC220  # it returns at once
            log.close()
        for name in names:
            await until(lambda name=name: self._is_ready(name), f"{name} is ready", READY_TIMEOUT_S)  # type: ignore[misc]

    def workers(self, role: WorkerRole.ValueType) -> list[WorkerRecord]:
        """Workers that the registry shows and that take new work."""
        return self.view.workers(role)

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def signal(self, name: str, number: int) -> None:
        """Sends a signal."""
        self._running[name].send_signal(number)

    async def wait(self, name: str, timeout_s: float = 30.0) -> int:
        """Waits for the end of a process and returns its exit status."""
        process = self._running[name]
        await until(lambda: process.poll() is not None, f"{name} ends", timeout_s)
        del self._running[name]
        return process.returncode

    def log(self, name: str) -> str:
        """What a process has logged."""
        return (self._log_dir / f"{name}.log").read_text()

    def _is_ready(self, name: str) -> bool:
        process = self._running[name]
        if process.poll() is not None:
            raise AssertionError(f"{name} ended with {process.returncode}:\n{self.log(name)[-4000:]}")
        if name == "router":
            ready = [line for line in self.log(name).splitlines() if '"service.ready"' in line]
            self.router = ready[-1].split('"address": "')[1].split('"')[0] if ready else ""
            return bool(ready)
        record = self.view.find(name)
        # the entry may still be that of a killed process of the same name; only this one has logged its address
        return record is not None and f'"address": "{record.capabilities.address}"' in self.log(name)
