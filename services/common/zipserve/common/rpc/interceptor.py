"""The one server interceptor: request id, span, metrics, and errors turned into statuses."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from zipserve.common import log, tracing
from zipserve.common.errors import DeadlineError, InternalError, InvalidRequestError, ZipserveError
from zipserve.common.metrics import Metrics
from zipserve.common.rpc import Context
from zipserve.common.rpc.door import Door
from zipserve.common.rpc.status import to_status

_log = log.get()
_ABORT_S = 5.0
"""How long a client that does not read is given to see why its call has ended; then it is just ended."""
_OPEN_TO_ALL = "/grpc.health."
_REFLECTION = "/grpc.reflection."


class _Malformed:
    """Stands for a request whose bytes could not be parsed."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of our own services; those of health are open to all, those of reflection behind the door.

    Args:
        door: None: everybody may come in.
    """

    def __init__(self, metrics: Metrics, door: Door | None = None) -> None:
        self._metrics = metrics
        self._door = door

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN_TO_ALL):
            return handler
        if method.startswith(_REFLECTION):
            return self._guarded(method, handler)
        deserialize = _tolerant(handler.request_deserializer)
        if handler.unary_unary:
            behaviour = self._unary(method, handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(behaviour, deserialize, handler.response_serializer)
        if handler.unary_stream:
            behaviour = self._stream(method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(behaviour, deserialize, handler.response_serializer)
        raise InternalError(f"{method} streams requests, which no service of ours does")

    def _guarded(self, method: str, handler: Any) -> Any:
        """A method that streams both ways, for those who may come in."""

        async def handle(requests: Any, context: Context) -> AsyncIterator[Any]:
            try:
                self._admit(method, context)
            except ZipserveError as error:
                await _abort(context, error)
            async for response in handler.stream_stream(requests, context):
                yield response

        return grpc.stream_stream_rpc_method_handler(handle, handler.request_deserializer, handler.response_serializer)

    def _admit(self, method: str, context: Context) -> None:
        if self._door is not None:
            self._door.admit(method, context.invocation_metadata() or ())

    def _unary(self, method: str, behaviour: Any) -> Any:
        async def handle(request: Any, context: Context) -> Any:
            async with self._around(method, request, context):
                return await behaviour(request, context)

        return handle

    def _stream(self, method: str, behaviour: Any) -> Any:
        # A coroutine that writes, not a generator: a call cancelled while it waits for a slow reader would leave a
        # generator suspended until it is collected, and its `finally` blocks with it.
        async def handle(request: Any, context: Context) -> None:
            async with self._around(method, request, context), aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    await context.write(response)

        return handle

    @asynccontextmanager
    async def _around(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        metadata = context.invocation_metadata() or ()
        request_id = next((str(value) for key, value in metadata if key == tracing.REQUEST_ID_KEY), "")
        started_s = time.monotonic()
        reason = "CANCELLED"
        bound = structlog.contextvars.bound_contextvars(request_id=request_id)
        with _gone_is_cancelled(), bound, tracing.server_span(method, metadata) as span:
            tracing.annotate("zipserve.request_id", lambda: request_id, span)
            try:
                self._admit(method, context)
                if isinstance(request, _Malformed):
                    raise InvalidRequestError(f"the request is not a valid message: {request.reason}")
                yield
                reason = "OK"
            except ZipserveError as error:
                reason = error.reason
                tracing.fail(span, error)
                await _abort(context, error)
            except TimeoutError as error:
                reason = DeadlineError.reason
                late = DeadlineError(str(error) or "the deadline passed")
                tracing.fail(span, late)
                await _abort(context, late)
            except grpc.aio.AbortError:
                reason = "ABORTED"
                raise
            except grpc.aio.BaseError:  # the call is over: its client has gone, or the server has stopped
                raise
            except Exception as error:  # noqa: BLE001  # whatever it is, the caller gets a typed error
                reason = InternalError.reason
                tracing.fail(span, error)
                _log.exception("rpc.failed", method=method)
                await _abort(context, InternalError("internal error; the server's log has the details"))
            finally:
                self._metrics.rpcs.labels(method, reason).inc()
                self._metrics.rpc_seconds.labels(method).observe(time.monotonic() - started_s)


@contextmanager
def _gone_is_cancelled() -> Iterator[None]:
    """A call that the core cannot send on has lost its client; gRPC would log that as a failure of ours."""
    try:
        yield
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


async def _abort(context: Context, error: ZipserveError) -> None:
    try:
        async with asyncio.timeout(_ABORT_S):
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
    except TimeoutError as late:  # a status comes after what was written before, and the client does not read
        raise asyncio.CancelledError from late


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC answers unparsable bytes with INTERNAL; this lets the handler answer INVALID_ARGUMENT instead."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return parse
