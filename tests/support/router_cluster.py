"""A router behind real gRPC with a real registry and fake workers, and how a test talks to it."""

import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from inprocess import SECRET, running
from router_peers import Peer, serving, until
from zipserve.common.models import ModelFiles
from zipserve.router.config import RouterSettings
from zipserve.router.service import RouterService
from zipserve.v1.inference_service_pb2 import Finished, GenerateRequest, GenerateResponse, Started, TokenIds
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

    async def add(self, name: str, **script: Any) -> Peer:
        """Adds a worker; `p…` prefills, `d…` decodes. Returns when the router knows it."""
        role = WorkerRole.WORKER_ROLE_PREFILL if name[0] == "p" else WorkerRole.WORKER_ROLE_DECODE
        peer = await self.stack.enter_async_context(serving(Peer(name, self.model, role, **script), self.settings))
        await self.knows(name)
        return peer

    async def knows(self, name: str) -> None:
        workers = self.service._workers
        assert workers is not None
        await until(lambda: name in {w.worker_id for w in workers.prefills() + workers.decodes()})

    def generate(self, *, timeout: float | None = 20.0, metadata: Any = None, **request: Any) -> Any:
        if "text" not in request and "chat" not in request:
            request.setdefault("token_ids", PROMPT)
        return self.stub.Generate(GenerateRequest(**request), timeout=timeout, metadata=metadata)

    @property
    def requests(self) -> int:
        frontend = self.service._frontend
        assert frontend is not None
        return frontend.requests


async def build(stack: AsyncExitStack, model: ModelFiles, redis_url: str, **settings: Any) -> Cluster:
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
    started: Started
    token_ids: list[int]
    text: str
    finished: Finished


def collect(responses: list[GenerateResponse]) -> Answer:
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
    return collect([response async for response in call])


@dataclass
class Refusal:
    code: grpc.StatusCode
    message: str
    reason: str
    field: str
    retry_s: float | None


async def refusal(call: Any) -> Refusal:
    """The error that a call ends with, with its google.rpc details."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    found = [d for d in (info, bad, retry) for detail in status.details if detail.Unpack(d)]
    assert info in found
    assert info.domain == "zipserve"
    return Refusal(
        caught.value.code(),
        caught.value.details() or "",
        info.reason,
        bad.field_violations[0].field if bad.field_violations else "",
        retry.retry_delay.ToTimedelta().total_seconds() if retry in found else None,
    )
