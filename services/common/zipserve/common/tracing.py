"""OpenTelemetry through gRPC metadata: the trace context travels with every call, and each hop has a span.

Without a configured SDK all of this does nothing; an operator configures one by the standard OTEL_* variables and
`opentelemetry-instrument`, or a test by setting a tracer provider.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from opentelemetry import propagate, trace

REQUEST_ID_KEY = "x-request-id"

_tracer = trace.get_tracer("zipserve")


def outgoing(request_id: str) -> list[tuple[str, str]]:
    """gRPC metadata for a call to another service: the request's id and the current trace context."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return [(REQUEST_ID_KEY, request_id), *carrier.items()]


def annotate(name: str, value: Callable[[], str]) -> None:
    """Adds an attribute to the current span; the value is made only if somebody records it."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attribute(name, value())


@contextmanager
def server_span(method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Iterator[trace.Span]:
    """The span of a call that came in with this metadata."""
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    with _tracer.start_as_current_span(method, context=propagate.extract(carrier), kind=trace.SpanKind.SERVER) as span:
        yield span
