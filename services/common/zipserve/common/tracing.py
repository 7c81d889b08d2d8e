"""OpenTelemetry: one trace per request, through gRPC metadata and HTTP headers over all hops.

`zipserve.common.telemetry` turns it on for a process. While it is off, nothing is recorded, passed on or computed.

The current span is a context variable. Coroutines and the tasks that they create may rely on it (`span`). Generators
must not: whoever resumes one would find its span to be the current one. They pass spans along (`start`, `lasting`).
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from zipserve.common.errors import ZipserveError

REQUEST_ID_KEY = "x-request-id"
NONE: Span = trace.INVALID_SPAN
"""Nobody's span."""

Attribute = str | bool | int | float
_tracer: trace.Tracer | None = None
_propagator = TraceContextTextMapPropagator()
_off: AbstractContextManager[Span] = nullcontext(NONE)


def use(tracer: trace.Tracer | None) -> None:
    """Records with a tracer from now on; None: nothing any more."""
    global _tracer  # noqa: PLW0603  # one per process, as the SDK's own
    _tracer = tracer


def outgoing(request_id: str) -> list[tuple[str, str]]:
    """gRPC metadata for a call to another service: the request's id and the current trace context."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        _propagator.inject(carrier)
    return [(REQUEST_ID_KEY, request_id), *carrier.items()]


def current() -> Span:
    """The current span."""
    return trace.get_current_span()


def trace_id(span: Span) -> str:
    """Id of the trace of a span, in hex; empty if there is none."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def start(
    name: str,
    parent: Span | None = None,
    attributes: Mapping[str, Attribute] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    start_s: float | None = None,
) -> Span:
    """A span that is not the current one, to be ended by the caller.

    Args:
        parent: None: the current span.
        start_s: when it began, in seconds of time.monotonic; None: now.
    """
    if _tracer is None:
        return NONE
    context = None if parent is None else trace.set_span_in_context(parent)
    return _tracer.start_span(
        name, context, kind, attributes, start_time=None if start_s is None else _since_epoch_ns(start_s)
    )


def record(
    name: str,
    start_s: float,
    end_s: float,
    parent: Span | None = None,
    attributes: Mapping[str, Attribute] | None = None,
) -> Span:
    """Adds a span of something that has happened, from and to seconds of time.monotonic, and returns it."""
    if _tracer is None:
        return NONE
    span = start(name, parent, attributes, start_s=start_s)
    span.end(_since_epoch_ns(end_s))
    return span


def using(span: Span) -> AbstractContextManager[Span]:
    """Makes a span the current one while the context is open, and does not end it."""
    if _tracer is None:
        return _off
    return trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False)


def span(
    name: str, attributes: Mapping[str, Attribute] | None = None, *, kind: SpanKind = SpanKind.INTERNAL
) -> AbstractContextManager[Span]:
    """A span that is the current one while the context is open. Not for generators."""
    return _off if _tracer is None else _current(start(name, None, attributes, kind=kind))


def lasting(
    name: str,
    parent: Span | None = None,
    attributes: Mapping[str, Attribute] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
) -> AbstractContextManager[Span]:
    """A span that lasts while the context is open, but is not the current one; for generators. See `start`."""
    return _off if _tracer is None else _ended(start(name, parent, attributes, kind=kind))


def server_span(method: str, metadata: Iterable[tuple[str, str | bytes]]) -> AbstractContextManager[Span]:
    """The span of a call that came in with this metadata, as the current one."""
    if _tracer is None:
        return _off
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    context = _propagator.extract(carrier)
    return _current(_tracer.start_span(method.removeprefix("/"), context, SpanKind.SERVER))


def link(span: Span) -> None:
    """Links the current span to one that may be in another trace."""
    context = span.get_span_context()
    if context.is_valid:
        current().add_link(context)


def annotate(name: str, value: Callable[[], Attribute], on: Span | None = None) -> None:
    """Adds an attribute to a span (None: the current one); the value is made only if somebody records it."""
    span = current() if on is None else on
    if span.is_recording():
        span.set_attribute(name, value())


def fail(span: Span, error: BaseException) -> None:
    """Notes how something ended that did not end well: an error, or that nobody wanted it any more."""
    if not span.is_recording() or "zipserve.outcome" in (getattr(span, "attributes", None) or {}):
        return  # or it has been noted by who knew better
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        span.set_attribute("zipserve.outcome", "CANCELLED")
        return
    reason = error.reason if isinstance(error, ZipserveError) else type(error).__name__
    span.set_attributes({"zipserve.outcome": reason, "error.type": reason})
    span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, str(error)))


@contextmanager
def _current(span: Span) -> Iterator[Span]:
    with using(span), _ended(span):
        yield span


@contextmanager
def _ended(span: Span) -> Iterator[Span]:
    try:
        yield span
    except BaseException as error:
        fail(span, error)
        raise
    finally:
        span.end()


def _since_epoch_ns(monotonic_s: float) -> int:
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
