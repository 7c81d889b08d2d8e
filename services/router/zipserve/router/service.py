"""The router as `zipserve.common.rpc.server` runs it: loads the tokenizer, watches the registry, drains."""

import asyncio
import secrets
from contextlib import AsyncExitStack
from pathlib import Path

import grpc

from zipserve.common import __version__, log
from zipserve.common.directory import DirectoryView
from zipserve.common.guide_matcher import GuideTokenizer
from zipserve.common.kv.holders import Holders
from zipserve.common.levels import tell_build
from zipserve.common.metrics import Metrics
from zipserve.common.models import resolve
from zipserve.common.registry import RegistryView
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.door import Entrance
from zipserve.common.rpc.tls import Certificates
from zipserve.common.settings import is_loopback
from zipserve.router.access.keyring import KeyRing
from zipserve.router.config import RouterSettings
from zipserve.router.facts import ModelFacts
from zipserve.router.frontend import Frontend
from zipserve.router.guides import GuideCheck
from zipserve.router.http.app import Api
from zipserve.router.http.server import HttpServer
from zipserve.router.servicer import InferenceServicer
from zipserve.router.tokenizer import PromptTokenizer
from zipserve.router.workers import GrpcWorkers
from zipserve.v1.inference_service_pb2 import DESCRIPTOR
from zipserve.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

_log = log.get()
_KEYS_POLL_S = 1.0


class RouterService:
    """A `zipserve.common.rpc.server.Service`."""

    def __init__(self, settings: RouterSettings) -> None:
        self.metrics = Metrics("router")
        self._settings = settings
        self._resources = AsyncExitStack()
        self._keys = KeyRing(Path(settings.keys_file) if settings.keys_file else None)
        self._certificates = Certificates(settings.public_tls) if settings.public_tls else None
        self._loops: list[asyncio.Task[None]] = []
        self._frontend: Frontend | None = None
        self._workers: GrpcWorkers | None = None
        self._http: HttpServer | None = None

    async def start(self, address: str) -> None:
        """Reads the model's files and takes the first look at the registry."""
        listens = [address for address in (self._settings.listen, self._settings.http_listen) if address]
        if self._keys.is_open and not all(is_loopback(address) for address in listens):
            _log.warning("access.open", listen=listens, advice="anybody may call: set keys_file")
        self._loops.append(asyncio.create_task(self._keys.watch(_KEYS_POLL_S), name="keys-watch"))
        model = await asyncio.to_thread(resolve, self._settings.model)
        self._capabilities = Capabilities(
            worker_id=self._settings.worker_id,
            incarnation=secrets.randbits(64),
            role=WorkerRole.WORKER_ROLE_ROUTER,
            address=address,
            model=model.name,
            model_revision=model.revision,
            version=__version__,
        )
        tell_build(self.metrics, "router", model=model.name)
        tokenizer = await asyncio.to_thread(PromptTokenizer.load, model.folder)
        facts = await asyncio.to_thread(ModelFacts.read, model.folder)
        eos = sorted(facts.eos_token_ids)
        vocabulary = await asyncio.to_thread(GuideTokenizer.load, model.folder, facts.vocab_tokens, eos)
        guides = GuideCheck(vocabulary, self._settings.guide_compile_s)
        self._resources.callback(guides.close)
        channels = await self._resources.enter_async_context(ChannelPool.within(self._settings))
        view = await self._resources.enter_async_context(RegistryView(self._settings))
        holders = Holders()
        await self._resources.enter_async_context(DirectoryView(self._settings, view, holders))
        self._workers = GrpcWorkers(view, channels)
        self._frontend = Frontend(self._settings, model, facts, tokenizer, guides, self._workers, holders, self.metrics)
        _log.info("model.ready", model=model.name, revision=model.revision, context_tokens=facts.context_tokens)
        if self._settings.http_listen:
            self._http = await self._serve_http(self._frontend, tokenizer)
            self._resources.push_async_callback(self._http.stop)
            host, _, port = self._http.address.rpartition(":")
            self._capabilities.metrics_address = f"{self._settings.advertise_host or host}:{port}"
            _log.info("http.ready", address=self._http.address)

    async def _serve_http(self, frontend: Frontend, tokenizer: PromptTokenizer) -> HttpServer:
        settings = self._settings
        return await HttpServer.start(
            Api(frontend, tokenizer, settings, self.metrics, self._keys.authenticate).app(),
            settings.http_listen,
            connections_max=settings.http_connections_max,
            unread_s=settings.deadline_default_s,
            tls=self._certificates.server_context() if self._certificates else None,
        )

    @property
    def http_address(self) -> str:
        """host:port of the HTTP API; empty: there is none."""
        return self._http.address if self._http is not None else ""

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        """Adds InferenceService."""
        assert self._frontend is not None
        servicer = InferenceServicer(self._frontend, self._keys, self._settings.message_bytes_max)
        add_InferenceServiceServicer_to_server(servicer, server)
        return [service.full_name for service in DESCRIPTOR.services_by_name.values()]

    def entrance(self) -> Entrance:
        """For whoever has a key, if any are asked for."""
        return Entrance(self._keys, self._certificates)

    def capabilities(self) -> Capabilities:
        """Who it is, for those who watch the cluster; workers do not look routers up."""
        return self._capabilities

    def load(self) -> Load:
        """Requests in flight."""
        frontend = self._frontend
        return Load(
            running_requests=frontend.requests if frontend else 0, draining=frontend.draining if frontend else False
        )

    def begin_drain(self) -> None:
        """Refuses new requests."""
        if self._frontend is not None:
            self._frontend.draining = True

    async def drained(self) -> None:
        """Returns when the last request has ended and its handle is given up."""
        if self._frontend is not None and self._workers is not None:
            await self._frontend.idle()
            await self._workers.settled()
        if self._http is not None:
            await self._http.stop()

    def loops(self) -> list[asyncio.Task[None]]:
        """The watch of the keys, and the HTTP server; requests run in their own calls."""
        return [*self._loops, *([self._http.task] if self._http is not None else [])]

    async def close(self) -> None:
        """Closes the HTTP server, channels and the registry."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self._resources.aclose()
