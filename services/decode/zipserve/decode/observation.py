"""What is seen of one call on the decode worker: its line in the log and the attributes of its span."""

from collections.abc import Iterator
from contextlib import contextmanager

from zipserve.common import log, tracing
from zipserve.common.errors import ZipserveError
from zipserve.decode.stream import Stream

_log = log.get()


@contextmanager
def observed(request_id: str) -> Iterator[list[Stream]]:
    """Tells how a call went, however it ends, with its streams, which are to be added when they have begun."""
    streams: list[Stream] = []
    outcome = "CANCELLED"
    try:
        yield streams
        outcome = "OK"
    except ZipserveError as error:
        outcome = error.reason
        raise
    finally:
        told = _told(streams)
        if tracing.current().is_recording():
            tracing.current().set_attributes({f"zipserve.{key}": value for key, value in told.items()})
        _log.info("sequence.finished", request_id=request_id, outcome=outcome, **told)


def _told(streams: list[Stream]) -> dict[str, str | int | float]:
    if not streams:
        return {}
    first = streams[0]
    return {
        "choices": len(streams),
        "tokens": sum(stream.generated for stream in streams),
        "cached_tokens": first.cached_tokens,
        "queue_s": round(first.queue_s, 4),
        "transfer_s": round(first.pulled.transfer_s, 4),
        "verify_s": round(first.pulled.verify_s, 4),
        "kv_bytes": first.pulled.size_bytes,
        "parkings": sum(stream.parkings for stream in streams),
    }
