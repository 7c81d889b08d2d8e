"""How many tokens of prompts fit into a step before it holds up the sequences that decode. Pure."""

CHUNK_TOKENS_MIN = 4
"""A prompt advances by so much whatever it costs, or it would never end."""
_WEIGHT = 0.3
_OUTLIER = 3.0
"""A step that is this many times slower or faster than expected counts as no more than that."""


class Pacing:
    """Learns from every step what decoding takes and what a prompt's token adds.

    Times of steps that only decode are kept by powers of two of their rows: they grow less than in proportion, since
    all rows share one read of the weights.

    Args:
        step_tokens: most tokens of prompts in a step, also when nothing decodes.
        slowdown_max: how many times longer than without prompts a step may take; above 1.
    """

    def __init__(self, step_tokens: int, slowdown_max: float) -> None:
        self._step_tokens = step_tokens
        self._slowdown_max = slowdown_max
        self._decode_s: dict[int, float] = {}
        self._token_s: float | None = None

    def chunk_tokens(self, rows: int) -> int:
        """Tokens of prompts for a step in which `rows` sequences decode.

        0 once for a number of rows that has never been seen: the step shows what they take by themselves.
        """
        if rows == 0:
            return self._step_tokens
        decode_s = self._decode_s.get(rows.bit_length())
        if decode_s is None:
            return 0
        tokens = 0.0 if self._token_s is None else (self._slowdown_max - 1) * decode_s / self._token_s
        whole = int(min(tokens, self._step_tokens)) // CHUNK_TOKENS_MIN * CHUNK_TOKENS_MIN
        return max(whole, CHUNK_TOKENS_MIN)

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """Learns from a step that decoded `rows` sequences and computed `tokens` tokens of prompts."""
        if tokens == 0:
            self._decode_s[rows.bit_length()] = _averaged(self._decode_s.get(rows.bit_length()), seconds)
            return
        decode_s = self._decode_s.get(rows.bit_length(), 0.0)
        # at least a part of the step was for the prompts, however the times of steps scatter
        self._token_s = _averaged(self._token_s, max(seconds - decode_s, 0.05 * seconds, 1e-9) / tokens)


def _averaged(known: float | None, sample: float) -> float:
    if not known:
        return sample
    return known + _WEIGHT * (min(max(sample, known / _OUTLIER), known * _OUTLIER) - known)
