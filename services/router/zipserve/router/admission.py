"""Admission: how many requests and tokens may be in flight, of all and of one caller, and when to come back."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.router.caller import ANYBODY, Caller

_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 60.0
_RETRY_UNKNOWN_S = 1.0
_HISTORY = 64
"""Departures that the drain rate is estimated from."""


@dataclass
class Ticket:
    """The place of one request; give it back with `Admission.leave`."""

    caller: str = ""
    tokens: int = 0


class _Departure(NamedTuple):
    at_s: float
    tokens: int
    caller: str


class Admission:
    """Counts what is in flight. Has no clock: callers say what time it is, in seconds."""

    def __init__(self, requests_max: int, tokens_max: int) -> None:
        self._requests_max = requests_max
        self._tokens_max = tokens_max
        self.requests = 0
        """Requests in flight."""
        self.tokens = 0
        """Tokens reserved by them."""
        self._of_caller: Counter[str] = Counter()
        """Requests of each caller in flight, by its name."""
        self._left: deque[_Departure] = deque(maxlen=_HISTORY)

    def enter(self, now_s: float, caller: Caller = ANYBODY) -> Ticket:
        """Takes a place for a request whose tokens are not known yet.

        Raises:
            OverloadedError: all places are taken, or all that the caller may have.
        """
        own = self._of_caller[caller.name]
        if caller.requests_max is not None and own >= caller.requests_max:
            departures = [departure for departure in self._left if departure.caller == caller.name]
            raise OverloadedError(
                f"{own} requests of key {caller.name!r} are in flight, {caller.requests_max} is its limit",
                retry_after_s=_retry_after_s(1, departures, [1] * len(departures), now_s),
            )
        if self.requests >= self._requests_max:
            raise OverloadedError(
                f"{self.requests} requests are in flight, {self._requests_max} is the limit",
                retry_after_s=_retry_after_s(1, self._left, [1] * len(self._left), now_s),
            )
        self.requests += 1
        self._of_caller[caller.name] += 1
        return Ticket(caller.name)

    def reserve(self, ticket: Ticket, tokens: int, now_s: float) -> None:
        """Adds the tokens of a request to its place.

        Raises:
            OverloadedError: too many tokens are in flight for now.
            InvalidRequestError: they would be too many for an idle router.
        """
        if tokens > self._tokens_max:
            raise InvalidRequestError(
                f"prompt and max_tokens are {tokens} tokens, this router admits at most {self._tokens_max}",
                field="stop.max_tokens",
            )
        if self.tokens + tokens > self._tokens_max:
            missing = self.tokens + tokens - self._tokens_max
            raise OverloadedError(
                f"the request needs {tokens} tokens, {self.tokens} of {self._tokens_max} are in flight",
                retry_after_s=_retry_after_s(missing, self._left, [left.tokens for left in self._left], now_s),
            )
        self.tokens += tokens
        ticket.tokens += tokens

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """Gives a place and its tokens back."""
        self.requests -= 1
        self.tokens -= ticket.tokens
        self._of_caller[ticket.caller] -= 1
        if not self._of_caller[ticket.caller]:
            del self._of_caller[ticket.caller]
        if ticket.tokens:
            self._left.append(_Departure(now_s, ticket.tokens, ticket.caller))


def _retry_after_s(missing: int, departures: Sequence[_Departure], amounts: Sequence[int], now_s: float) -> float:
    """How long departures as fast as the last ones, each of such an amount, take to free what is missing."""
    if not departures or now_s <= departures[0].at_s:
        return _RETRY_UNKNOWN_S
    rate = sum(amounts) / (now_s - departures[0].at_s)
    return min(max(missing / rate, _RETRY_MIN_S), _RETRY_MAX_S)
