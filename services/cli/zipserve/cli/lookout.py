"""Where `zipserve top` looks: the processes of a cluster as the registry shows them, or those that are named.

Each is asked for its metrics.
"""

import asyncio
import http.client
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from zipserve.cli.board import Look, Process
from zipserve.cli.exposition import Exposition, Sample, parse
from zipserve.common import stack_file

_TIMEOUT_S = 2.0
_ANSWER_BYTES_MAX = 16 << 20
Lookout = Callable[[], Awaitable[Look]]


def of_addresses(addresses: Sequence[str]) -> Lookout:
    """Looks at services by the addresses of their metrics."""

    async def look() -> Look:
        asked = await asyncio.gather(*(_asked(address, "", address, "ready") for address in addresses))
        return Look(time.monotonic(), asked)

    return look


async def of_cluster(stack: AsyncExitStack, **settings: str) -> Lookout:
    """Looks at all that the registry shows; it is read until the stack ends.

    Args:
        settings: `redis_url` and `cluster`; what is not given is read from ZIPSERVE_TOP_REDIS_URL and …_CLUSTER.

    Raises:
        ImportError: the packages of a service are not installed.
    """
    from pydantic_settings import SettingsConfigDict  # noqa: PLC0415  # a client alone does not have these

    from zipserve.common import log  # noqa: PLC0415
    from zipserve.common.registry import RegistryView  # noqa: PLC0415
    from zipserve.common.settings import ServiceSettings  # noqa: PLC0415
    from zipserve.v1.worker_service_pb2 import WorkerRole  # noqa: PLC0415

    log.configure(level="error", style="console")  # what the registry has to say would stand on the screen

    class TopSettings(ServiceSettings):
        model_config = SettingsConfigDict(env_prefix="ZIPSERVE_TOP_")

    values: dict[str, Any] = {**settings, "secret": "who only reads signs nothing"}
    view = await stack.enter_async_context(RegistryView(TopSettings(**values)))

    async def look() -> Look:
        return Look(time.monotonic(), await asyncio.gather(*map(of_record, view.records())))

    async def of_record(record: Any) -> Process:
        facts, load = record.capabilities, record.load
        role = WorkerRole.Name(facts.role).removeprefix("WORKER_ROLE_").lower()
        state = "draining" if load.draining else "ready"
        if not facts.metrics_address:
            return Process(facts.worker_id, role, "", state, _of_load(load))
        return await _asked(facts.worker_id, role, facts.metrics_address, state)

    return look


def stack_of(log_dir: str) -> dict[str, str]:
    """How to find what `zipserve up` runs, from the folder of its logs.

    Raises:
        OSError, ValueError: it does not say.
    """
    found = stack_file.read(Path(log_dir))
    return {name: found[name] for name in ("redis_url", "cluster")}


async def _asked(name: str, role: str, address: str, state: str) -> Process:
    try:
        exposition = parse(await asyncio.to_thread(_fetched, address))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Process(name, role, address, f"no metrics: {error}")
    return Process(name, role or _role(exposition), address, state, exposition)


def _fetched(address: str) -> str:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"status {response.status}")
        return response.read(_ANSWER_BYTES_MAX).decode(errors="replace")
    finally:
        connection.close()


def _role(exposition: Exposition) -> str:
    return next(iter(exposition.by("zipserve_build_info", "service")), "")


def _of_load(load: Any) -> Exposition:
    """What the registry tells of a process that serves no metrics."""
    used = load.total_blocks - load.free_blocks
    told = {
        "zipserve_running_requests": load.running_requests,
        "zipserve_queued_requests": load.queued_requests,
        "zipserve_parked_requests": load.parked_requests,
        "zipserve_kv_leases": load.leases,
    }
    blocks = {"used": used, "idle": load.idle_blocks, "free": load.free_blocks - load.idle_blocks}
    slabs = [Sample({"arena": "block", "state": state}, count) for state, count in blocks.items()]
    return Exposition({**{name: [Sample({}, count)] for name, count in told.items()}, "zipserve_kv_slabs": slabs})
