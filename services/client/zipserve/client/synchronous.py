"""The client for threads."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
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


class Client:
    """A connection to a router. Safe to use from several threads; close it, or use it as a context manager."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: Tls | None = None,
        retry: Retry = ONCE,
        message_bytes_max: int = 4 << 20,
    ) -> None:
        """Connects to host:port on first use.

        Args:
            api_key: sent with every call.
            tls: None: the connection is not encrypted.
            retry: of calls that fail before their first event because the server is full or away.
            message_bytes_max: largest message, in bytes.
        """
        self._connection = Connection(address, api_key, tls, retry, message_bytes_max)
        options = self._connection.options()
        self._channel = (
            grpc.insecure_channel(address, options)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options)
        )
        self._stub = InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        **parameters: Unpack[Parameters],
    ) -> "Stream":
        """Starts an answer.

        Args:
            timeout_s: longest time for the whole answer. None: no limit of the client's.
            request_id: name of the request in the server's logs. Empty: the server draws one.
        """
        request, metadata = requests.generate_request(prompt, parameters), self._connection.metadata(request_id)
        attempts = Attempts(self._connection.retry, timeout_s)

        def call() -> Any:
            return self._stub.Generate(request, timeout=attempts.remaining_s(), metadata=metadata)

        return Stream(call, attempts, request.n)

    def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        **parameters: Unpack[Parameters],
    ) -> pb.GenerateUnaryResponse:
        """The whole answer; `choices[0].text` is its text. Arguments as of `generate`.

        Raises:
            ZipserveError: the call failed.
        """
        request = pb.GenerateUnaryRequest(request=requests.generate_request(prompt, parameters))
        return self._call(self._stub.GenerateUnary, request, timeout_s, request_id)

    def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str = "",
        timeout_s: float | None = 10.0,
        **template: Unpack[Template],
    ) -> list[int]:
        """Token ids of a prompt, as it would be computed.

        Raises:
            ZipserveError: the call failed.
        """
        request = requests.tokenize_request(prompt, model, template)
        return list(self._call(self._stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = 10.0) -> str:
        """Text of token ids, without special tokens.

        Raises:
            ZipserveError: the call failed.
        """
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._call(self._stub.Detokenize, request, timeout_s).text

    def models(self, timeout_s: float | None = 10.0) -> list[pb.Model]:
        """The models served.

        Raises:
            ZipserveError: the call failed.
        """
        return list(self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s).models)

    def model(self, model: str = "", timeout_s: float | None = 10.0) -> pb.Model:
        """A model by its id; empty: the only one served.

        Raises:
            ZipserveError: the call failed.
        """
        return self._call(self._stub.GetModel, pb.GetModelRequest(model=model), timeout_s).model

    def _call(self, method: Callable[..., T], request: object, timeout_s: float | None, request_id: str = "") -> T:
        attempts, metadata = Attempts(self._connection.retry, timeout_s), self._connection.metadata(request_id)
        while True:
            try:
                return method(request, timeout=attempts.remaining_s(), metadata=metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.pause_s(typed(error)))

    def close(self) -> None:
        """Ends the connection and cancels running answers."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(Iterator[Event]):
    """The events of the answer to one request, as they come; checked, so that no token is lost or repeated unnoticed.

    Iterating raises a ZipserveError when the call failed. Closing it, or leaving its context, cancels what still runs;
    the server frees everything at once.
    """

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
        self._closed = threading.Event()

    def __next__(self) -> Event:
        while not self._closed.is_set():
            try:
                response = next(self._call)
            except StopIteration:
                self._order.end()
                raise
            except grpc.RpcError as error:
                if self._closed.is_set():
                    break
                self._try_again(typed(error))
                continue
            self._begun = True
            if (event := self._order.take(response)) is not None:
                return event
        raise StopIteration

    def _try_again(self, error: ZipserveError) -> None:
        if self._begun:
            raise error
        if not self._closed.wait(self._attempts.pause_s(error)):
            self._call = self._start()

    def close(self) -> None:
        """Ends the answer. May be called from any thread; who iterates meanwhile gets no further event."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
