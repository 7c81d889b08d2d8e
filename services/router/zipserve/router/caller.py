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
    """Highest priority that its requests have, whatever they ask for. None: any."""
    requests_max: int | None = None
    """Most requests in flight. None: only the router's own limit."""

    def salt(self, of_request: str) -> str:
        """The salt of a request of this caller: no other pair of salts has the same. Empty if both are."""
        if not self.cache_salt and not of_request:
            return ""
        return f"{len(self.cache_salt)}:{self.cache_salt}{of_request}"

    def priority(self, of_request: int) -> int:
        """The priority of a request of this caller: what it asks for, but no more than the caller may have."""
        return of_request if self.priority_max is None else min(of_request, self.priority_max)


ANYBODY = Caller()
