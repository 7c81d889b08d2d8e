"""The error tree, and its way through gRPC and back: every class, unary and stream, over a real server."""

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from polling import until
from zipserve.common import errors
from zipserve.common.errors import (
    BY_REASON,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    WorkerLostError,
    ZipserveError,
)
from zipserve.common.metrics import Metrics
from zipserve.common.rpc import Context
from zipserve.common.rpc.interceptor import ServiceInterceptor
from zipserve.common.rpc.status import client_errors, from_rpc_error, to_status
from zipserve.v1.decode_service_pb2 import DecodeRequest, DecodeResponse, EndSequenceRequest, EndSequenceResponse
from zipserve.v1.decode_service_pb2_grpc import (
    DecodeServiceServicer,
    DecodeServiceStub,
    add_DecodeServiceServicer_to_server,
)
from zipserve.v1.worker_service_pb2 import (
    GetCapabilitiesRequest,
    GetCapabilitiesResponse,
    ListStepsRequest,
    ListStepsResponse,
)
from zipserve.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    WorkerServiceStub,
    add_WorkerServiceServicer_to_server,
)

CLASSES = sorted(BY_REASON.values(), key=lambda cls: cls.reason)
MESSAGE = "needs 3 KV blocks, 1 of 64 is free; größer ☃ %41 100%"
UNARY, STREAM = "/zipserve.v1.WorkerService/GetCapabilities", "/zipserve.v1.DecodeService/Decode"


class Failing(WorkerServiceServicer, DecodeServiceServicer):
    """Raises what it is told to."""

    error: BaseException
    events = 0
    """Events of a stream before the error."""

    async def GetCapabilities(self, request: GetCapabilitiesRequest, context: Context) -> GetCapabilitiesResponse:
        raise self.error

    async def ListSteps(self, request: ListStepsRequest, context: Context) -> ListStepsResponse:
        raise self.error

    async def Decode(self, request: DecodeRequest, context: Context) -> AsyncIterator[DecodeResponse]:
        for _ in range(self.events):
            yield DecodeResponse()
        raise self.error

    async def EndSequence(self, request: EndSequenceRequest, context: Context) -> EndSequenceResponse:
        raise self.error


@asynccontextmanager
async def served(servicer: Failing, metrics: Metrics) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[ServiceInterceptor(metrics)])
    add_WorkerServiceServicer_to_server(servicer, server)
    add_DecodeServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def servicer() -> Failing:
    return Failing()


@pytest.fixture
async def channel(servicer: Failing, metrics: Metrics) -> AsyncIterator[grpc.aio.Channel]:
    async with served(servicer, metrics) as channel:
        yield channel


async def call(channel: grpc.aio.Channel, kind: str) -> None:
    if kind == "unary":
        await WorkerServiceStub(channel).GetCapabilities(GetCapabilitiesRequest(), timeout=5)
    else:
        async for _ in DecodeServiceStub(channel).Decode(DecodeRequest(), timeout=5):
            pass


def counted(metrics: Metrics, kind: str, reason: str) -> float:
    method = UNARY if kind == "unary" else STREAM
    return metrics.registry.get_sample_value("zipserve_rpcs_total", {"method": method, "reason": reason}) or 0.0


def test_reasons_are_unique_and_codes_exist() -> None:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ZipserveError)]
    assert len({cls.reason for cls in classes}) == len(classes) == len(BY_REASON)
    for cls in classes:
        assert cls.reason == cls.reason.upper()
        assert "reason" in vars(cls), f"{cls.__name__} has its parent's reason"
        assert code_pb2.Code.Value(cls.code) == getattr(grpc.StatusCode, cls.code).value[0]


def test_the_docstring_draws_the_tree() -> None:
    """Every class stands there, under its parent, with its own status where that is not its parent's."""
    drawn = _drawn(errors.__doc__ or "")
    assert set(drawn) == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        parent, code = drawn[cls.__name__]
        assert cls is ZipserveError or parent == cls.__bases__[0].__name__
        inherited = cls.code if cls is ZipserveError else cls.__bases__[0].code  # type: ignore[attr-defined]
        assert code == cls.code or (not code and cls.code == inherited)


def test_which_errors_may_be_replayed() -> None:
    """The router prefills again after these, and after no others."""
    replayable = {cls.__name__ for cls in CLASSES if cls.replayable}
    families = (errors.OverloadedError, errors.UnavailableError, errors.HandoffError)
    assert replayable == {cls.__name__ for cls in CLASSES if issubclass(cls, families)}


@pytest.mark.parametrize("kind", ["unary", "stream", "late"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
async def test_round_trip(
    cls: type[ZipserveError], kind: str, servicer: Failing, metrics: Metrics, channel: grpc.aio.Channel
) -> None:
    extra: dict[str, Any] = {"worker_id": "prefill-0", "größe": "☃"}
    if cls is OverloadedError:
        extra["retry_after_s"] = 2.5
    if cls is InvalidRequestError:
        extra["field"] = "token_ids"
    error = servicer.error = cls(MESSAGE, **extra)
    servicer.events = 3 if kind == "late" else 0
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(channel, kind)
    _check_status(raised.value, error)
    again = from_rpc_error(raised.value)
    assert type(again) is cls
    assert (again.message, again.metadata, str(again)) == (error.message, error.metadata, str(error))
    assert vars(again) == vars(error), "an attribute was lost on the way"
    await until(lambda: counted(metrics, kind, cls.reason) == 1, "it is counted")


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_client_errors_raises_our_class(kind: str, servicer: Failing, channel: grpc.aio.Channel) -> None:
    servicer.error = errors.BlockStaleError("freed")
    with pytest.raises(errors.BlockStaleError, match="freed"), client_errors():
        await call(channel, kind)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_defect_becomes_internal_and_tells_nothing(
    kind: str, servicer: Failing, metrics: Metrics, channel: grpc.aio.Channel
) -> None:
    servicer.error = KeyError("a private matter")
    with pytest.raises(InternalError) as raised, client_errors():
        await call(channel, kind)
    assert "private" not in raised.value.message
    await until(lambda: counted(metrics, kind, "INTERNAL") == 1, "it is counted")


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_timeout_becomes_a_deadline(
    kind: str, servicer: Failing, metrics: Metrics, channel: grpc.aio.Channel
) -> None:
    servicer.error = TimeoutError()
    with pytest.raises(DeadlineError), client_errors():
        await call(channel, kind)
    await until(lambda: counted(metrics, kind, "DEADLINE_EXCEEDED") == 1, "it is counted")


@pytest.mark.parametrize("kind", ["unary", "stream"])
@pytest.mark.parametrize("text", ["x" * 100_000, "☃" * 30_000], ids=["ascii", "unicode"])
async def test_a_long_message_still_arrives_typed(
    kind: str, text: str, servicer: Failing, channel: grpc.aio.Channel
) -> None:
    """gRPC drops trailers beyond some kilobytes, and the caller would see neither class nor reason."""
    servicer.error = InvalidRequestError(f"model {text} is unknown", field="model", model=text)
    with pytest.raises(InvalidRequestError, match=r"^model [x☃]{100}") as raised, client_errors():
        await call(channel, kind)
    assert raised.value.field == "model"


async def test_a_message_that_is_no_unicode(servicer: Failing, channel: grpc.aio.Channel) -> None:
    servicer.error = InvalidRequestError("no folder \udcff here", path="\udcff")
    with pytest.raises(InvalidRequestError, match=r"^no folder . here$"), client_errors():
        await call(channel, "unary")


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_bytes_that_are_no_message(kind: str, metrics: Metrics, channel: grpc.aio.Channel) -> None:
    raw: Any = channel
    call_raw = raw.unary_unary(UNARY) if kind == "unary" else raw.unary_stream(STREAM)
    answer = call_raw(b"\xff\xff\xff\xff", timeout=5)

    async def read() -> None:
        with client_errors():
            _ = await answer if kind == "unary" else [event async for event in answer]

    with pytest.raises(InvalidRequestError, match="not a valid message"):
        await read()
    await until(lambda: counted(metrics, kind, "INVALID_REQUEST") == 1, "it is counted")


async def test_an_unknown_method(channel: grpc.aio.Channel) -> None:
    raw: Any = channel
    with pytest.raises(InternalError, match="unexpected status UNIMPLEMENTED"), client_errors():
        await raw.unary_unary("/zipserve.v1.WorkerService/Nothing")(b"", timeout=5)


async def test_success_is_counted(metrics: Metrics) -> None:
    class Working(Failing):
        async def GetCapabilities(self, request: GetCapabilitiesRequest, context: Context) -> GetCapabilitiesResponse:
            return GetCapabilitiesResponse()

    async with served(Working(), metrics) as channel:
        await call(channel, "unary")
    await until(lambda: counted(metrics, "unary", "OK") == 1, "it is counted")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, WorkerLostError),
        (grpc.StatusCode.CANCELLED, WorkerLostError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, InvalidRequestError),
        (grpc.StatusCode.UNKNOWN, InternalError),
        (grpc.StatusCode.PERMISSION_DENIED, InternalError),
    ],
)
def test_statuses_of_grpc_itself(code: grpc.StatusCode, expected: type[ZipserveError]) -> None:
    raw = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="from the core")
    again = from_rpc_error(raw)
    assert type(again) is expected
    assert "from the core" in again.message


@pytest.mark.parametrize(
    ("domain", "reason"), [("zipserve", "A_REASON_OF_A_LATER_VERSION"), ("googleapis.com", "OVERLOADED")]
)
def test_details_that_are_not_ours(domain: str, reason: str) -> None:
    status = to_status(OverloadedError("full"))
    del status.details[:]
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    assert type(from_rpc_error(_rpc_error(status))) is InvalidRequestError  # what gRPC's own code stands for


@given(st.floats(0, 1e6))
def test_retry_after(seconds: float) -> None:
    again = from_rpc_error(_rpc_error(to_status(OverloadedError("full", retry_after_s=seconds))))
    assert isinstance(again, OverloadedError)
    assert math.isclose(again.retry_after_s, seconds, abs_tol=0.0006)


def test_metadata_named_like_an_argument() -> None:
    """Another version may send any key; the error must still arrive."""
    status = to_status(errors.HandoffError("torn"))
    info = error_details_pb2.ErrorInfo(reason="HANDOFF_FAILED", domain="zipserve", metadata={"message": "x"})
    status.details[0].Pack(info)
    assert type(from_rpc_error(_rpc_error(status))) is errors.HandoffError


def _rpc_error(status: Any) -> grpc.aio.AioRpcError:
    code = next(c for c in grpc.StatusCode if c.value[0] == status.code)
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=status.message)


def _check_status(raw: grpc.aio.AioRpcError, error: ZipserveError) -> None:
    """What a client in any language sees."""
    assert raw.code().name == error.code
    assert raw.details() == error.message
    status = rpc_status.from_call(raw)  # type: ignore[arg-type]  # AioRpcError has what it reads
    assert status is not None
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    details = {detail.type_url.rpartition(".")[2]: detail for detail in status.details}
    assert details["ErrorInfo"].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == ("zipserve", error.reason, error.metadata)
    assert ("RetryInfo" in details) is isinstance(error, OverloadedError)
    if isinstance(error, OverloadedError):
        assert details["RetryInfo"].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == 2500
    assert ("BadRequest" in details) is isinstance(error, InvalidRequestError)
    if isinstance(error, InvalidRequestError):
        assert details["BadRequest"].Unpack(bad)
        assert bad.field_violations[0].field == "token_ids"


def _drawn(docstring: str) -> dict[str, tuple[str, str]]:
    """(parent, status) of every class in a drawing with tree characters."""
    drawn: dict[str, tuple[str, str]] = {}
    path: list[str] = []
    names = set(code_pb2.Code.keys())
    for name, depth, rest in _drawn_lines(docstring):
        del path[depth:]
        code = next((word for word in rest if word in names), "")
        drawn[name] = (path[-1] if path else "", code)
        path.append(name)
    return drawn


def _drawn_lines(docstring: str) -> Iterator[tuple[str, int, list[str]]]:
    for line in docstring.splitlines():
        words = line.replace("├──", "   ").replace("└──", "   ").replace("│", " ").split()
        if words and words[0].endswith("Error") and line.startswith("    "):
            with suppress(ValueError):
                yield words[0], (line.index(words[0]) - 4) // 4, words[1:]
