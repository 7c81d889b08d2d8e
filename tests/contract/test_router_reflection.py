"""gRPC reflection of the router, used as grpcurl does: list, describe, and call with messages built from that."""

from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from router_cluster import Cluster, build
from router_peers import text_at
from zipserve.common.models import ModelFiles

SERVICE = "zipserve.v1.InferenceService"


@pytest.fixture
async def cluster(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Cluster:
    cluster = await build(stack, model, redis_url)
    await cluster.add("p0")
    await cluster.add("d0")
    return cluster


class Reflected:
    """A client that knows nothing of the protos."""

    def __init__(self, cluster: Cluster) -> None:
        self._channel = cluster.channel
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    async def ask(self, request: ServerReflectionRequest) -> ServerReflectionResponse:
        stub: Any = ServerReflectionStub(self._channel)  # type: ignore[arg-type]  # its stubs know only synchronous ones
        (response,) = [response async for response in stub.ServerReflectionInfo(iter([request]), timeout=10)]
        assert isinstance(response, ServerReflectionResponse)
        return response

    async def services(self) -> set[str]:
        response = await self.ask(ServerReflectionRequest(list_services=""))
        return {service.name for service in response.list_services_response.service}

    async def describe(self, symbol: str) -> Any:
        await self._learn(await self.ask(ServerReflectionRequest(file_containing_symbol=symbol)))
        return self._pool.FindServiceByName(symbol)

    async def call(self, method: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
        kind = "unary_stream" if method.server_streaming else "unary_unary"
        call = getattr(self._channel, kind)(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        message = json_format.ParseDict(request, message_factory.GetMessageClass(method.input_type)())
        running = call(message, timeout=10)
        responses = [part async for part in running] if method.server_streaming else [await running]
        return [json_format.MessageToDict(response) for response in responses]

    async def _learn(self, response: ServerReflectionResponse) -> None:
        for file in self._parsed(response.file_descriptor_response.file_descriptor_proto):
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for dependency in file.dependency:
                await self._learn(await self.ask(ServerReflectionRequest(file_by_filename=dependency)))
            self._pool.Add(file)

    @staticmethod
    def _parsed(files: Iterable[bytes]) -> list[descriptor_pb2.FileDescriptorProto]:
        return [descriptor_pb2.FileDescriptorProto.FromString(file) for file in files]


async def test_services_can_be_listed(cluster: Cluster) -> None:
    assert await Reflected(cluster).services() == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_a_client_without_protos_can_call_everything(cluster: Cluster) -> None:
    reflected = Reflected(cluster)
    methods = (await reflected.describe(SERVICE)).methods_by_name
    assert set(methods) == {"Generate", "GenerateUnary", "Tokenize", "Detokenize", "ListModels", "GetModel"}
    events = await reflected.call(methods["Generate"], {"text": "!" * 10, "stop": {"maxTokens": 4}})
    assert "started" in events[0]
    assert "".join(event.get("delta", {}).get("text", "") for event in events) == text_at(10, 4)
    (whole,) = await reflected.call(methods["GenerateUnary"], {"request": {"text": "!" * 10, "stop": {"maxTokens": 4}}})
    assert whole["choices"][0]["text"] == text_at(10, 4)
    (tokens,) = await reflected.call(methods["Tokenize"], {"text": "!!"})
    assert tokens["tokenIds"] == [3, 3]
    (text,) = await reflected.call(methods["Detokenize"], {"tokenIds": tokens["tokenIds"]})
    assert text == {"text": "!!"}
    (models,) = await reflected.call(methods["ListModels"], {})
    (model,) = await reflected.call(methods["GetModel"], {"model": "tiny"})
    assert models["models"] == [model["model"]]
    assert model["model"]["contextTokens"] == 512


async def test_reflection_can_be_turned_off(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, reflection=False)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Reflected(cluster).services()
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
