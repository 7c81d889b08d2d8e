"""Who asks: what a key stands for, and what it may do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """A client as the router knows it."""

    name: str = ""
    """In logs and metrics. Empty: nobody in particular, where no keys are asked for."""
    cache_salt: str = ""
    """KV is shared only among callers of the same salt; what a request brings as its own salt divides further."""
    priority_max: int | None = None
    """Highest priority that its requests may ask for. None: any."""
    requests_max: int | None = None
    """Most requests in flight. None: only the router's own limit."""


ANYBODY = Caller()
