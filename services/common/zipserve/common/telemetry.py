"""Sends the spans of a process to an OTLP/gRPC collector, in batches and from a thread of the SDK's own.

Only where an endpoint is set, by `otlp_endpoint` or the standard OTEL_* variables, which also choose sampler, headers,
certificates, batches and limits. Without one, the SDK is not even imported.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from zipserve.common import __version__, log, tracing
from zipserve.common.settings import ServiceSettings

_log = log.get()
_FLUSH_S = 3.0
"""For the last spans: by itself the SDK tries for 10 s to reach a collector that is gone."""


@contextmanager
def exporting(service: str, settings: ServiceSettings) -> Iterator[None]:
    """Traces while the context is open; what is left then is sent, for some seconds at most."""
    if not settings.otlp_endpoint:
        yield
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  # for who traces
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    _catch_warnings()
    ours = {
        "service.name": f"zipserve-{service}",
        "service.namespace": settings.cluster,
        "service.instance.id": settings.worker_id,
        "service.version": __version__,
    }
    provider = TracerProvider(
        resource=Resource.create(ours).merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.otlp_endpoint)))
    tracing.use(provider.get_tracer("zipserve", __version__))
    try:
        yield
    finally:
        tracing.use(None)
        ending = threading.Thread(target=provider.shutdown, name="last-spans", daemon=True)
        ending.start()
        ending.join(_FLUSH_S)


def _catch_warnings() -> None:
    """What the SDK has to say, such as that nobody answers, is a line like all others."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _log.warning("trace.not_sent", error=record.getMessage())

    logger = logging.getLogger("opentelemetry")
    logger.handlers, logger.propagate = [Handler(logging.WARNING)], False
