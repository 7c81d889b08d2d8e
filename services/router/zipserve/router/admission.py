"""Admission: how many requests and tokens may be in flight, and when to come back if there are too many."""

from collections import deque
from dataclasses import dataclass

from zipserve.common.errors import InvalidRequestError, OverloadedError

_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 60.0
_RETRY_UNKNOWN_S = 1.0
_HISTORY = 64
"""Departures that the drain rate is estimated from."""


@dataclass
class Ticket:
    """The place of one request; give it back with `Admission.leave`."""

    tokens: int = 0


class Admission:
    """Counts what is in flight. Has no clock: callers say what time it is, in seconds."""

    def __init__(self, requests_max: int, tokens_max: int) -> None:
        self._requests_max = requests_max
        self._tokens_max = tokens_max
        self.requests = 0
        """Requests in flight."""
        self.tokens = 0
        """Tokens reserved by them."""
        self._left: deque[tuple[float, int]] = deque(maxlen=_HISTORY)

    def enter(self, now_s: float) -> Ticket:
        """Takes a place for a request whose tokens are not known yet.

        Raises:
            OverloadedError: all places are taken.
        """
        if self.requests >= self._requests_max:
            raise OverloadedError(
                f"{self.requests} requests are in flight, {self._requests_max} is the limit",
                retry_after_s=self._retry_after_s(1, [1] * len(self._left), now_s),
            )
        self.requests += 1
        return Ticket()

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
                retry_after_s=self._retry_after_s(missing, [tokens for _, tokens in self._left], now_s),
            )
        self.tokens += tokens
        ticket.tokens += tokens

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """Gives a place and its tokens back."""
        self.requests -= 1
        self.tokens -= ticket.tokens
        if ticket.tokens:
            self._left.append((now_s, ticket.tokens))

    def _retry_after_s(self, missing: int, amounts: list[int], now_s: float) -> float:
        """How long departures as fast as the last ones take to free what is missing."""
        if not self._left or now_s <= self._left[0][0]:
            return _RETRY_UNKNOWN_S
        rate = sum(amounts) / (now_s - self._left[0][0])
        return min(max(missing / rate, _RETRY_MIN_S), _RETRY_MAX_S)
