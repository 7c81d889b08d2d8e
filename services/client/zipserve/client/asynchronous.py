"""The client for asyncio. Methods are those of `synchronous.Client`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from zipserve.client import requests
from zipserve.client.connection import Connection, Tls, typed
from zipserve.client.events import Event, Order
from zipserve.client.requests import Message, Parameters, Prompt, Template
from zipserve.client.retry import ONCE, Attempts, Retry
from zipserve.common.errors import ZipserveError
from zipserve.v1 import inference_service_pb2 as pb
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub

T = TypeVar("T")


class AsyncClient:
    """A connection to a router, for one event loop. Close it, or use it as an asynchronous context manager."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: Tls | None = None,
        retry: Retry = ONCE,
        message_bytes_max: int = 4 << 20,
    ) -> None:
        """Connects to host:port on first use; make it where the event loop runs. Arguments as of `Client`."""
        self._connection = Connection(address, api_key, tls, retry, message_bytes_max)
        options = self._connection.options()
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), options)
        )
        self._stub = InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        **parameters: Unpack[Parameters],
    ) -> "AsyncStream":
        """Starts an answer."""
        request, metadata = requests.generate_request(prompt, parameters), self._connection.metadata(request_id)
        attempts = Attempts(self._connection.retry, timeout_s)

        def call() -> Any:
            return self._stub.Generate(request, timeout=attempts.remaining_s(), metadata=metadata)

        return AsyncStream(call, attempts, request.n)

    async def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        **parameters: Unpack[Parameters],
    ) -> pb.GenerateUnaryResponse:
        """The whole answer; `choices[0].text` is its text."""
        request = pb.GenerateUnaryRequest(request=requests.generate_request(prompt, parameters))
        return await self._call(self._stub.GenerateUnary, request, timeout_s, request_id)

    async def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str = "",
        timeout_s: float | None = 10.0,
        **template: Unpack[Template],
    ) -> list[int]:
        """Token ids of a prompt, as it would be computed."""
        request = requests.tokenize_request(prompt, model, template)
        return list((await self._call(self._stub.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = 10.0) -> str:
        """Text of token ids, without special tokens."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return (await self._call(self._stub.Detokenize, request, timeout_s)).text

    async def models(self, timeout_s: float | None = 10.0) -> list[pb.Model]:
        """The models served."""
        return list((await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s)).models)

    async def model(self, model: str = "", timeout_s: float | None = 10.0) -> pb.Model:
        """A model by its id; empty: the only one served."""
        return (await self._call(self._stub.GetModel, pb.GetModelRequest(model=model), timeout_s)).model

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: object, timeout_s: float | None, request_id: str = ""
    ) -> T:
        attempts, metadata = Attempts(self._connection.retry, timeout_s), self._connection.metadata(request_id)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_s(), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(attempts.pause_s(typed(error)))

    async def close(self) -> None:
        """Ends the connection and cancels running answers."""
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStream(AsyncIterator[Event]):
    """The events of the answer to one request; see `synchronous.Stream`."""

    def __init__(self, call: Callable[[], Any], attempts: Attempts, n: int = 1) -> None:
        """
        Args:
            call: starts the call; once more for each further attempt.
            n: choices asked for.
        """
        self._start = call
        self._attempts = attempts
        self._order = Order(n)
        self._call = call()
        self._begun = False
        self._closed = False

    async def __anext__(self) -> Event:
        while not self._closed:
            try:
                response = await self._call.read()
            except grpc.aio.AioRpcError as error:
                await self._try_again(typed(error))
                continue
            except asyncio.CancelledError:
                if self._closed and not _cancelling():
                    break
                raise
            if response is grpc.aio.EOF:
                self._order.end()
                break
            self._begun = True
            if (event := self._order.take(response)) is not None:
                return event
        raise StopAsyncIteration

    async def _try_again(self, error: ZipserveError) -> None:
        if self._begun:
            raise error
        await asyncio.sleep(self._attempts.pause_s(error))
        if not self._closed:
            self._call = self._start()

    def close(self) -> None:
        """Ends the answer; who iterates meanwhile gets no further event."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cancelling() -> bool:
    """Whether it is this task that is being cancelled, not the call that it reads."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
