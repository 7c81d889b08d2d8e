"""Runs a service: start, serve, drain on SIGTERM, stop."""

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from zipserve.common import log, telemetry
from zipserve.common.errors import InternalError, InvalidRequestError
from zipserve.common.metrics import Metrics
from zipserve.common.registry import RegistryWriter
from zipserve.common.rpc import Context
from zipserve.common.rpc.door import ClusterTokens, Entrance
from zipserve.common.rpc.duration import to_duration
from zipserve.common.rpc.interceptor import ServiceInterceptor
from zipserve.common.settings import ServiceSettings
from zipserve.common.steps import Step
from zipserve.v1 import worker_service_pb2, worker_service_pb2_grpc

_log = log.get()
_ANSWER_S = 4.0
"""Within which an event loop has to answer a kubelet, who asks again."""
_STEPS_MAX = 4096
"""In one answer; about 100 kB."""


class Service(Protocol):
    """What `serve` needs of a service."""

    metrics: Metrics

    async def start(self, address: str) -> None:
        """Gets ready to serve under `address`; takes as long as loading a model takes."""

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        """Adds the servicers to a server and returns their full names."""

    def entrance(self) -> Entrance | None:
        """Who may call, and over which TLS. None: the services of the cluster, which know its secret."""

    def capabilities(self) -> worker_service_pb2.Capabilities | None:
        """What the registry shall know, always the same object; None for a service that nobody looks up there."""

    def load(self) -> worker_service_pb2.Load:
        """The load now."""

    def begin_drain(self) -> None:
        """Refuses new work from now on."""

    async def drained(self) -> None:
        """Returns when no work is left: streams finished, slabs pulled or given up."""

    def loops(self) -> Sequence["asyncio.Task[None]"]:
        """Background tasks that never end by themselves; when one does, the service is over."""

    async def close(self) -> None:
        """Frees everything. Called also when `start` failed or draining took too long."""


class WorkerServicer(worker_service_pb2_grpc.WorkerServiceServicer):
    """Tells a worker's capabilities and load, and its last steps."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def GetCapabilities(
        self, request: worker_service_pb2.GetCapabilitiesRequest, context: Context
    ) -> worker_service_pb2.GetCapabilitiesResponse:
        return worker_service_pb2.GetCapabilitiesResponse(
            capabilities=self._service.capabilities(), load=self._service.load()
        )

    async def ListSteps(
        self, request: worker_service_pb2.ListStepsRequest, context: Context
    ) -> worker_service_pb2.ListStepsResponse:
        known = self._service.metrics.steps
        if request.after > known.last:
            raise InvalidRequestError(
                f"after is {request.after}, the last step is {known.last}: has the worker started anew?", field="after"
            )
        steps, last, lost = known.after(request.after, min(request.max or _STEPS_MAX, _STEPS_MAX))
        facts = self._service.capabilities()
        return worker_service_pb2.ListStepsResponse(
            steps=map(_told, steps), next=last, lost=lost, incarnation=facts.incarnation if facts else 0
        )


def _told(step: Step) -> worker_service_pb2.WorkerStep:
    return worker_service_pb2.WorkerStep(
        prompt_tokens=step.prompt_tokens,
        pairs=step.pairs,
        rows=step.rows,
        context_tokens=step.context_tokens,
        duration=to_duration(step.seconds),
    )


async def serve(
    service: Service,
    settings: ServiceSettings,
    shutdown: asyncio.Event,
    on_ready: Callable[[str], None] | None = None,
    on_started: Callable[[], None] | None = None,
) -> None:
    """Serves until `shutdown` is set, then drains for at most `settings.drain_s`.

    `on_started` is called when the service has started, before anybody is served.
    `on_ready` is called with the advertised address as soon as requests are accepted.

    Raises:
        OSError: the address to listen on is taken.
        InternalError: a background task of the service has ended; it can serve no more.
    """
    entrance = service.entrance() or ClusterTokens.entrance(settings)
    server = grpc.aio.server(
        interceptors=[ServiceInterceptor(service.metrics, entrance.door)],
        options=_options(settings),
    )
    try:
        if entrance.certificates is None:
            port = server.add_insecure_port(settings.listen)
        else:
            port = server.add_secure_port(settings.listen, entrance.certificates.server_credentials())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {settings.listen}: {error}") from error
    address = settings.advertised(port)
    try:
        await service.start(address)
        if on_started is not None:
            on_started()
        names = service.add_to(server)
        facts = service.capabilities()
        if facts is not None and facts.role != worker_service_pb2.WorkerRole.WORKER_ROLE_ROUTER:  # its face is public
            worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(service), server)
            names.append("zipserve.v1.WorkerService")
        await _serve_started(service, settings, server, names, address, shutdown, on_ready)
    finally:
        await server.stop(0)
        await service.close()


def _options(settings: ServiceSettings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", settings.message_bytes_max),
        ("grpc.max_send_message_length", settings.message_bytes_max),
        ("grpc.max_concurrent_streams", settings.connection_calls_max),
        ("grpc.so_reuseport", 0),
        # Peers that vanish without a word, so that nothing is computed for them.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Peers may ask the same of us, but a connection that asks more often is closed.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
    ]
    if settings.connection_age_max_s:
        options.append(("grpc.max_connection_age_ms", round(settings.connection_age_max_s * 1000)))
    return options


async def _serve_started(
    service: Service,
    settings: ServiceSettings,
    server: grpc.aio.Server,
    names: list[str],
    address: str,
    shutdown: asyncio.Event,
    on_ready: Callable[[str], None] | None,
) -> None:
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if settings.reflection:
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    facts = service.capabilities()
    ready = asyncio.Event()
    lives = partial(_answers, asyncio.get_running_loop())
    metrics_port = service.metrics.serve(settings.host, settings.metrics_port, ready.is_set, lives)
    if facts is not None and metrics_port is not None:
        facts.metrics_address = settings.advertised(metrics_port)
    await server.start()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    ready.set()
    async with RegistryWriter(settings, facts, service.load):
        _log.info("service.ready", address=address)
        if on_ready is not None:
            on_ready(address)
        await _until_shutdown(shutdown, service.loops())
        started_s = time.monotonic()
        service.begin_drain()
        ready.clear()
        await checks.enter_graceful_shutdown()
        # the registry still shows the worker, now as draining, to readers that must find it for their pulls
        try:
            await asyncio.wait_for(service.drained(), settings.drain_s)
            drained = True
        except TimeoutError:
            drained = False
        _log.info("service.drained", complete=drained, seconds=round(time.monotonic() - started_s, 3))
    await server.stop(grace=1.0)


def _answers(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the event loop does anything; asked from another thread."""
    answered = threading.Event()
    with suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(answered.set)
    return answered.wait(_ANSWER_S)


async def _until_shutdown(shutdown: asyncio.Event, loops: Sequence["asyncio.Task[None]"]) -> None:
    stopping = asyncio.create_task(shutdown.wait(), name="shutdown")
    try:
        await asyncio.wait({stopping, *loops}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    for loop in loops:
        if loop.done():
            error = None if loop.cancelled() else loop.exception()
            raise InternalError(f"the service's {loop.get_name()} has ended, it can serve no more") from error


def stop_on_signals(shutdown: asyncio.Event) -> None:
    """Sets `shutdown` on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.set)


def run(service_name: str, service: Service, settings: ServiceSettings) -> None:
    """The whole life of a service's process."""
    log.configure(
        level=settings.log_level, style=settings.log_format, service=service_name, worker_id=settings.worker_id
    )

    async def main() -> None:
        shutdown = asyncio.Event()
        stop_on_signals(shutdown)
        await serve(service, settings, shutdown, on_started=_settle)

    with telemetry.exporting(service_name, settings):
        asyncio.run(main())


def _settle() -> None:
    """What a service was started with stays to its end. The collector would look at it again and again, and all calls
    would wait: for tenths of a second where torch was imported."""
    gc.collect()
    gc.freeze()
