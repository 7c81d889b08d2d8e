"""How many tokens of prompts fit into a step before it holds up the sequences that decode. Pure."""

CHUNK_TOKENS_MIN = 4
"""A prompt advances by so much whatever it costs, or it would never end."""
_WEIGHT = 0.3
_OUTLIER = 3.0
"""A step that is this many times slower or faster than expected counts as no more than that."""
_SLOPE_WEIGHT = 0.05
_TOKEN_SHARE_MIN = 0.1
"""Of the whole of a chunk, at least so much goes by the token."""
_LOOK_AGAIN = 64
"""After so many steps with prompts one without shows what decoding takes by now: contexts grow."""


class Pacing:
    """Learns from every step what decoding takes and what prompts add.

    Times of steps that only decode are kept by powers of two of their rows: they grow less than in proportion, since
    all rows share one read of the weights.

    Args:
        step_tokens: most tokens of prompts in a step, also when nothing decodes.
        slowdown_max: how many times longer than without prompts a step may take; above 1.
        free_s: a step may take so long in any case.
    """

    def __init__(self, step_tokens: int, slowdown_max: float, free_s: float = 0.0) -> None:
        self._step_tokens = step_tokens
        self._slowdown_max = slowdown_max
        self._free_s = free_s
        self._decode_s: dict[int, float] = {}
        self._not_seen_for: dict[int, int] = {}
        self._cost = _Cost()

    def chunk_tokens(self, rows: int) -> int:
        """Tokens of prompts for a step in which `rows` sequences decode.

        0 once for a number of rows that has never been seen, and now and then later: the step shows what they take by
        themselves.
        """
        if rows == 0:
            return self._step_tokens
        kind = rows.bit_length()
        decode_s = self._decode_s.get(kind)
        if decode_s is None or self._not_seen_for.get(kind, 0) >= _LOOK_AGAIN:
            return 0
        tokens = self._cost.tokens_in(max(self._slowdown_max * decode_s, self._free_s) - decode_s)
        whole = int(min(tokens, self._step_tokens)) // CHUNK_TOKENS_MIN * CHUNK_TOKENS_MIN
        return max(whole, CHUNK_TOKENS_MIN)

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """Learns from a step that decoded `rows` sequences and computed `tokens` tokens of prompts."""
        kind = rows.bit_length()
        if tokens == 0:
            self._decode_s[kind] = _averaged(self._decode_s.get(kind), seconds)
            self._not_seen_for[kind] = 0
            return
        if rows:
            self._not_seen_for[kind] = self._not_seen_for.get(kind, 0) + 1
        # at least a part of the step was for the prompts, however the times of steps scatter
        self._cost.note(tokens, max(seconds - self._decode_s.get(kind, 0.0), 0.05 * seconds, 1e-9))


class _Cost:
    """What a chunk adds to a step: something fixed, since it goes through the model by itself, and so much a token.

    A line through the lately seen; how steep it is, chunks of different lengths tell, however long ago they were.
    Where all were equally long, each token is taken to cost its share of the whole, which is too much rather than too
    little.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._spread = 0.0
        self._rise = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """Learns from a chunk."""
        if not self._tokens:
            self._tokens, self._seconds = float(tokens), seconds
            return
        expected_s = self._seconds + self._token_s * (tokens - self._tokens)
        seconds = min(max(seconds, expected_s / _OUTLIER), expected_s * _OUTLIER)
        off_tokens, off_s = tokens - self._tokens, seconds - self._seconds
        self._spread += _SLOPE_WEIGHT * (off_tokens * off_tokens - self._spread)
        self._rise += _SLOPE_WEIGHT * (off_tokens * off_s - self._rise)
        self._tokens += _WEIGHT * off_tokens
        self._seconds += _WEIGHT * off_s

    def tokens_in(self, seconds: float) -> float:
        """Tokens of a chunk that adds so much."""
        if not self._tokens:
            return 0.0
        return self._tokens + (seconds - self._seconds) / self._token_s

    @property
    def _token_s(self) -> float:
        share_s = self._seconds / self._tokens
        if not self._spread:
            return share_s
        return min(max(self._rise / self._spread, _TOKEN_SHARE_MIN * share_s), share_s)


def _averaged(known: float | None, sample: float) -> float:
    if not known:
        return sample
    return known + _WEIGHT * (min(max(sample, known / _OUTLIER), known * _OUTLIER) - known)
