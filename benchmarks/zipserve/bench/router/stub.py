"""`python -m zipserve.bench.router.stub`: a prefill and a decode worker that compute nothing.

They register as real ones do. Every token is there at once; the messages that carry them are made beforehand.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from zipserve.common import log
from zipserve.common.metrics import Metrics
from zipserve.common.rpc import Context
from zipserve.common.rpc.duration import to_duration
from zipserve.common.rpc.server import serve, stop_on_signals
from zipserve.common.settings import ServiceSettings
from zipserve.v1.decode_service_pb2 import DecodedTokens, DecodeFinished, DecodeRequest, DecodeResponse, Pulled
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.prefill_service_pb2 import (
    PrefillRequest,
    PrefillResponse,
    ReleaseHandleRequest,
    ReleaseHandleResponse,
)
from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceServicer, add_PrefillServiceServicer_to_server
from zipserve.v1.sampling_pb2 import FinishReason
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

CONTEXT_TOKENS = 8192
_LAYOUT = b"a stub's layout"
_PULLED = DecodeResponse(pulled=Pulled(blocks=1)).SerializeToString()
_FINISHED = DecodeResponse(finished=DecodeFinished(reason=FinishReason.FINISH_REASON_LENGTH)).SerializeToString()


class StubSettings(ServiceSettings):
    """Settings of the stubs."""

    model_config = SettingsConfigDict(env_prefix="ZIPSERVE_STUB_")

    model_name: str
    """Of the model that the router serves."""
    model_revision: str
    """Its revision."""
    token_ids: list[int] = Field(min_length=1)
    """What is generated, over and over."""


class Stub:
    """One worker; a `zipserve.common.rpc.server.Service`."""

    def __init__(self, settings: StubSettings, role: WorkerRole.ValueType) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._role = role
        self._address = ""
        self._incarnation = secrets.randbits(64)
        self._messages = [
            DecodeResponse(tokens=DecodedTokens(position=at, token_ids=[self._token(at)])).SerializeToString()
            for at in range(CONTEXT_TOKENS if role == WorkerRole.WORKER_ROLE_DECODE else 0)
        ]

    async def start(self, address: str) -> None:
        """Nothing to load."""
        self._address = address

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        """Adds the service of its role."""
        if self._role == WorkerRole.WORKER_ROLE_PREFILL:
            add_PrefillServiceServicer_to_server(_Prefill(self._token), server)
            return ["zipserve.v1.PrefillService"]
        name = "zipserve.v1.DecodeService"
        handlers: dict[str, grpc.RpcMethodHandler[DecodeRequest, bytes]] = {
            "Decode": grpc.unary_stream_rpc_method_handler(self._decode, DecodeRequest.FromString)
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        return [name]

    def capabilities(self) -> Capabilities:
        """Of a worker of the router's model."""
        return Capabilities(
            worker_id=WorkerRole.Name(self._role),
            incarnation=self._incarnation,
            role=self._role,
            address=self._address,
            model=self._settings.model_name,
            model_revision=self._settings.model_revision,
            context_tokens=CONTEXT_TOKENS,
            readable_layouts=[_LAYOUT],
            writable_layout=_LAYOUT if self._role == WorkerRole.WORKER_ROLE_PREFILL else b"",
            layout_description="none",
            block_tokens=128,
        )

    def load(self) -> Load:
        """Always idle."""
        return Load(free_blocks=1, total_blocks=1)

    def entrance(self) -> None:
        return None

    def begin_drain(self) -> None:
        """Nothing to end."""

    async def drained(self) -> None:
        """At once."""

    def loops(self) -> Sequence[asyncio.Task[None]]:
        """None."""
        return ()

    async def close(self) -> None:
        """Nothing to free."""

    def _token(self, position: int) -> int:
        token_ids = self._settings.token_ids
        return token_ids[position % len(token_ids)]

    async def _decode(self, request: DecodeRequest, context: Context) -> AsyncIterator[bytes]:
        yield _PULLED
        start = int(request.handle.claims) + 1
        for message in self._messages[start : start + request.max_new_tokens]:
            yield message
        yield _FINISHED


class _Prefill(PrefillServiceServicer):
    def __init__(self, token: Callable[[int], int]) -> None:
        self._token = token

    async def Prefill(self, request: PrefillRequest, context: Context) -> PrefillResponse:
        started_s = time.perf_counter()
        position = len(request.token_ids)
        answer = PrefillResponse(
            token_id=self._token(position), handle=KvHandle(claims=str(position).encode(), mac=b"none")
        )
        answer.compute_time.CopyFrom(to_duration(time.perf_counter() - started_s))
        return answer

    async def ReleaseHandle(self, request: ReleaseHandleRequest, context: Context) -> ReleaseHandleResponse:
        return ReleaseHandleResponse()


async def _serve(settings: StubSettings) -> None:
    shutdown = asyncio.Event()
    stop_on_signals(shutdown)
    async with asyncio.TaskGroup() as running:
        for role in (WorkerRole.WORKER_ROLE_PREFILL, WorkerRole.WORKER_ROLE_DECODE):
            own = settings.model_copy(update={"worker_id": WorkerRole.Name(role)})
            running.create_task(serve(Stub(own, role), own, shutdown))


def main() -> None:
    """Serves until SIGTERM."""
    settings = StubSettings.load()
    log.configure(level=settings.log_level, style=settings.log_format, service="stub", worker_id=settings.worker_id)
    asyncio.run(_serve(settings))


if __name__ == "__main__":
    main()
