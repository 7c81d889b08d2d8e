"""How fast prompts are computed here, as far as the last steps tell. Pure: the clock is passed in."""

_WEIGHT = 0.2
_OUTLIER = 2.0
"""A step that is this many times slower or faster than the estimate counts as no more than that."""
_VALID_S = 30.0
"""An older estimate is none: otherwise one slow spell would have everything refused, and never be corrected."""
_CERTAINTY = 2.0
"""Only who would be late even at this many times the estimate is called late."""


class Throughput:
    """A moving average of tokens per second.

    Args:
        step_tokens: of a full step; steps of less than half of that are no measure, they are slower per token.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._tokens_per_s = 0.0
        self._measured_at_s = float("-inf")

    def note(self, tokens: int, seconds: float, now_s: float) -> None:
        """Learns from a step."""
        if 2 * tokens < self._step_tokens or seconds <= 0:
            return
        rate = tokens / seconds
        if self._knows(now_s):
            known = self._tokens_per_s
            rate = known + _WEIGHT * (min(max(rate, known / _OUTLIER), known * _OUTLIER) - known)
        self._tokens_per_s, self._measured_at_s = rate, now_s

    def tokens_per_s(self, now_s: float) -> float:
        """The estimate; 0 while nothing is known."""
        return self._tokens_per_s if self._knows(now_s) else 0.0

    def seconds_at_least(self, tokens: int, now_s: float) -> float:
        """Time that computing `tokens` tokens will certainly take; 0 while nothing is known."""
        return tokens / (_CERTAINTY * self._tokens_per_s) if self._knows(now_s) else 0.0

    def _knows(self, now_s: float) -> bool:
        return now_s - self._measured_at_s < _VALID_S
