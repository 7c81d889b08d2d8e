"""When a process that died is started again, and how its death is told. Pure."""

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class RestartPolicy:
    """Bounded back-off: delays double, and a process that dies again and again is given up."""

    delay_first_s: float = 0.25
    delay_max_s: float = 5.0
    settled_s: float = 30.0
    """A life of at least this time, in which the process was ready, clears its record."""
    deaths_max: int = 5
    """Deaths in a row after which a process is given up."""
    start_deaths_max: int = 2
    """The same for one that has never been ready: what fails twice while starting does so for a reason that stays."""


class Restarts:
    """The record of one process."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._deaths = 0
        self._proven = False

    def after_death(self, lived_s: float, *, was_ready: bool) -> float | None:
        """Notes a death; returns the delay before the next start in seconds, or None to give up."""
        self._proven = self._proven or was_ready
        if was_ready and lived_s >= self._policy.settled_s:
            self._deaths = 0
        self._deaths += 1
        if self._deaths >= (self._policy.deaths_max if self._proven else self._policy.start_deaths_max):
            return None
        return float(min(self._policy.delay_first_s * 2 ** (self._deaths - 1), self._policy.delay_max_s))

    @property
    def deaths(self) -> int:
        """Deaths in a row."""
        return self._deaths


def describe_exit(code: int) -> str:
    """How a process ended, from its return code as `subprocess` gives it: negative for a signal."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
