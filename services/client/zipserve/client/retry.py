"""When a call that failed is tried again. Has no clock of its own."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from zipserve.common.errors import OverloadedError, UnavailableError, ZipserveError


@dataclass(frozen=True)
class Retry:
    """Calls that fail before their first event, because the server is full or away, are tried again."""

    attempts_max: int = 1
    """Most attempts of a call. 1: it is not tried again."""
    backoff_s: float = 0.1
    """Pause after the first attempt where the server names none; doubles with every further one."""
    backoff_max_s: float = 5.0
    """Longest such pause."""


ONCE = Retry()


class Attempts:
    """The attempts of one call, within its deadline."""

    def __init__(
        self,
        retry: Retry,
        timeout_s: float | None,
        now: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """
        Args:
            timeout_s: for all attempts together. None: no limit.
            draw: a number in [0, 1), so that clients which fail together do not come back together.
        """
        self._retry = retry
        self._now = now
        self._draw = draw
        self._deadline_s = None if timeout_s is None else now() + timeout_s
        self._failed = 0

    def remaining_s(self) -> float | None:
        """What is left of the time; None: there is no limit."""
        return None if self._deadline_s is None else max(self._deadline_s - self._now(), 0.0)

    def pause_s(self, error: ZipserveError) -> float:
        """How long to wait before the next attempt; raises the error if there is none."""
        self._failed += 1
        if not isinstance(error, OverloadedError | UnavailableError) or self._failed >= self._retry.attempts_max:
            raise error
        backoff_s = min(self._retry.backoff_s * 2.0 ** (self._failed - 1), self._retry.backoff_max_s)
        least_s = error.retry_after_s if isinstance(error, OverloadedError) else backoff_s
        pause_s = least_s + backoff_s * self._draw()
        left_s = self.remaining_s()
        if left_s is not None and pause_s >= left_s:
            raise error
        return pause_s
