"""A router behind real gRPC with a real registry and fake workers, and how a test talks to it."""

import uuid
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from inprocess import SECRET, running
from polling import until
from router_peers import Peer, serving
from zipserve.common.models import ModelFiles
from zipserve.router.config import RouterSettings
from zipserve.router.frontend import Frontend
from zipserve.router.service import RouterService
from zipserve.router.workers import GrpcWorkers
from zipserve.v1.inference_service_pb2 import (
    Finished,
    GenerateRequest,
    GenerateResponse,
    GenerateUnaryRequest,
    Started,
    TokenIds,
)
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.worker_service_pb2 import WorkerRole

PROMPT = TokenIds(ids=[3] * 10)


@dataclass
class Cluster:
    """A router and its fake workers; more can be added."""

    settings: RouterSettings
    model: ModelFiles
    stack: AsyncExitStack
    service: RouterService
    address: str
    channel: grpc.aio.Channel
    stub: Any
    peers: list[Peer] = field(default_factory=list)

    async def add(self, name: str, **script: Any) -> Peer:
        """Adds a worker; `p…` prefills, `d…` decodes. Returns when the router knows it."""
        role = WorkerRole.WORKER_ROLE_PREFILL if name[0] == "p" else WorkerRole.WORKER_ROLE_DECODE
        peer = await self.stack.enter_async_context(serving(Peer(name, self.model, role, **script), self.settings))
        self.peers.append(peer)
        await self.knows(name)
        return peer

    async def knows(self, name: str) -> None:
        """Returns when the router knows a worker."""
        await until(lambda: name in {w.worker_id for w in [*self.workers.prefills(), *self.workers.decodes()]}, name)

    def generate(self, *, timeout: float | None = 20.0, metadata: Any = None, **request: Any) -> Any:
        """Starts a call, of PROMPT unless the request has another prompt."""
        if not {"text", "chat", "token_ids"} & set(request):
            request["token_ids"] = PROMPT
        return self.stub.Generate(GenerateRequest(**request), timeout=timeout, metadata=metadata)

    def complete(self, *, timeout: float | None = 20.0, metadata: Any = None, **request: Any) -> Any:
        """Starts the same call with the answer as a whole."""
        if not {"text", "chat", "token_ids"} & set(request):
            request["token_ids"] = PROMPT
        asked = GenerateUnaryRequest(request=GenerateRequest(**request))
        return self.stub.GenerateUnary(asked, timeout=timeout, metadata=metadata)

    @property
    def frontend(self) -> Frontend:
        """The router's inside."""
        assert self.service._frontend is not None
        return self.service._frontend

    @property
    def workers(self) -> GrpcWorkers:
        """The router's view of its workers."""
        assert self.service._workers is not None
        return self.service._workers

    async def at_rest(self) -> None:
        """Returns when the router has no request, no count and no release left over."""
        await until(lambda: self.frontend.requests == 0, "no request is left")
        in_flight = self.frontend._in_flight
        assert (in_flight.prefill_tokens, in_flight.decode_requests) == (Counter(), Counter())
        assert self.frontend._admission.tokens == 0
        await self.workers.settled()


async def build(stack: AsyncExitStack, model: ModelFiles, redis_url: str, **settings: Any) -> Cluster:
    """Starts a router without workers; it ends with the stack."""
    values = {
        "cluster": uuid.uuid4().hex,
        "redis_url": redis_url,
        "secret": SECRET,
        "model": str(model.folder),
        "heartbeat_s": 0.05,
        "worker_wait_s": 0.2,
        "drain_s": 5.0,
    }
    own = RouterSettings.model_validate({**values, **settings})
    service = RouterService(own)
    address = await stack.enter_async_context(running(service, own))
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    return Cluster(own, model, stack, service, address, channel, InferenceServiceStub(channel))


@dataclass
class Answer:
    """A whole stream, put together."""

    started: Started
    token_ids: list[int]
    text: str
    finished: Finished


def collect(responses: list[GenerateResponse]) -> Answer:
    """Puts a stream together, and checks that it has every event in order and every token once."""
    responses = [response for response in responses if response.WhichOneof("event") != "prompt_logprobs"]
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    token_ids: list[int] = []
    text = ""
    for response in responses[1:-1]:
        assert response.delta.index == len(token_ids)
        token_ids += response.delta.token_ids
        text += response.delta.text
    assert responses[-1].finished.usage.completion_tokens == len(token_ids)
    return Answer(responses[0].started, token_ids, text, responses[-1].finished)


async def answer(call: Any) -> Answer:
    """Reads a call to its end."""
    return collect([response async for response in call])


@dataclass
class Refusal:
    """An error as a client sees it."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str
    retry_s: float | None


async def refusal(call: Any) -> Refusal:
    """The error that a call ends with, streamed or not, with its google.rpc details."""
    try:
        if not hasattr(call, "__aiter__"):
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return explain(error)
    raise AssertionError("the call succeeded")


def explain(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads the details of a status."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # AioRpcError has what it reads
    assert status is not None, error
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    kinds: dict[str, Any] = {message.DESCRIPTOR.full_name: message for message in (info, bad, retry)}
    for detail in status.details:
        assert detail.Unpack(kinds[detail.TypeName()])
    assert info.domain == "zipserve", error
    return Refusal(
        error.code(),
        error.details() or "",
        info.reason,
        bad.field_violations[0].field if bad.field_violations else "",
        retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
    )
