"""A collector of traces as operators run one, but in the test: OTLP over real gRPC, spans by name and parent."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue


@dataclass(frozen=True)
class Seen:
    """A span as it was sent."""

    name: str
    trace_id: str
    span_id: bytes
    parent_id: bytes
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: tuple[str, ...]
    links: tuple[bytes, ...]
    """Ids of the spans that it has links to."""
    failed: bool
    resource: dict[str, Any]


@dataclass
class Collector(TraceServiceServicer):
    """All spans that have come."""

    endpoint: str = ""
    spans: list[Seen] = field(default_factory=list)

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        for of_resource in request.resource_spans:
            resource = _plain(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self.spans += [
                    Seen(
                        name=span.name,
                        trace_id=span.trace_id.hex(),
                        span_id=span.span_id,
                        parent_id=span.parent_span_id,
                        start_ns=span.start_time_unix_nano,
                        end_ns=span.end_time_unix_nano,
                        attributes=_plain(span.attributes),
                        events=tuple(event.name for event in span.events),
                        links=tuple(link.span_id for link in span.links),
                        failed=span.status.code == span.status.STATUS_CODE_ERROR,
                        resource=resource,
                    )
                    for span in of_scope.spans
                ]
        return ExportTraceServiceResponse()

    def named(self, name: str) -> list[Seen]:
        """Those of a name, the first first."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_ns)

    def one(self, name: str) -> Seen:
        """The only one of a name."""
        (span,) = self.named(name)
        return span

    def tree(self, root: Seen, *, without: str) -> Any:
        """Names: of a span alone, or with those of its children in the order of their beginning.

        Args:
            without: what is left out, with all below it: names that begin so.
        """
        children = [span for span in self.spans if span.parent_id == root.span_id and not span.name.startswith(without)]
        below = [self.tree(child, without=without) for child in sorted(children, key=lambda span: span.start_ns)]
        return {root.name: below} if below else root.name


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens while the context is open."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(1).wait()


def _plain(attributes: Sequence[KeyValue]) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in attributes}
