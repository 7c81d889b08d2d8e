"""Errors to gRPC statuses with google.rpc details, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from zipserve.common.errors import (
    BY_REASON,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    WorkerLostError,
    ZipserveError,
)

DOMAIN = "zipserve"
# gRPC drops trailers beyond 8 KiB, and the message stands in them three times, once with three bytes for one.
_MESSAGE_BYTES_MAX = 1024
_METADATA_BYTES_MAX = 256


def to_status(error: ZipserveError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, RetryInfo and BadRequest where they apply.

    A long message, as one that repeats what a client has sent, is cut.
    """
    message = _cut(error.message, _MESSAGE_BYTES_MAX)
    metadata = {key: _cut(value, _METADATA_BYTES_MAX) for key, value in error.metadata.items()}
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def _cut(text: str, bytes_max: int) -> str:
    data = text.encode(errors="replace")  # a file's name may hold what is no Unicode
    return data.decode() if len(data) <= bytes_max else data[: bytes_max - 3].decode(errors="ignore") + "…"


class FailedCall(Protocol):
    """What gRPC raises for a call that failed, synchronous or not."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...


def from_rpc_error(error: FailedCall) -> ZipserveError:
    """The error that the other side raised; one of gRPC's own becomes the nearest class."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it reads code, details and trailing metadata
    except ValueError:  # a proxy on the way has changed the code or message that the details repeat
        status = None
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in BY_REASON:
            metadata = {key: value for key, value in info.metadata.items() if key not in ("self", "message")}
            return BY_REASON[info.reason](error.details() or "", **metadata)
    text = error.details() or ""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return WorkerLostError(f"connection lost: {text}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"deadline exceeded: {text}")
        case grpc.StatusCode.CANCELLED:
            return WorkerLostError(f"the other side cancelled: {text}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return InvalidRequestError(f"message too large: {text}")
        case code:
            return InternalError(f"unexpected status {code.name}: {text}")


@contextmanager
def client_errors() -> Iterator[None]:
    """Turns gRPC's errors of the calls made inside into ours."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    except TimeoutError as error:
        raise DeadlineError("deadline exceeded") from error
