"""Seconds to google.protobuf.Duration and back."""

from google.protobuf.duration_pb2 import Duration


def to_duration(seconds: float) -> Duration:
    """The nearest Duration, in nanoseconds."""
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def to_seconds(duration: Duration) -> float:
    """Seconds of a Duration; 0 when it was unset."""
    return duration.ToNanoseconds() / 1e9
