"""How many tokens of prompts a decode worker adds to a step: what it learns, and what it makes of that. Compiled.

The rule of the decode worker's own `pacing.py`, number by number: what it has learned when a prompt comes depends on
the steps before, and converges to no constant while prompts and batches differ.
"""

import numpy as np
from numpy.typing import NDArray

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled

Floats = NDArray[np.float64]

CHUNK_TOKENS_MIN = 4
_WEIGHT = 0.3
_OUTLIER = 3.0
_SLOPE_WEIGHT = 0.05
_TOKEN_SHARE_MIN = 0.1
_LOOK_AGAIN = 64
_SHARE_MIN = 0.05
"""Of a step with prompts that is put down to them at least."""
_LEAST = 1e-9
_KINDS = 64
"""Of batches, by the bits of their number of rows."""
_TOKENS, _MS, _SPREAD, _RISE = range(4)
_DECODE = 4
_NOT_SEEN_FOR = _DECODE + _KINDS
_COLUMNS = _NOT_SEEN_FOR + _KINDS


def fresh_paces(workers: int) -> Floats:
    """What decode workers have learned before their first step: [workers, columns]."""
    paces = np.zeros((workers, _COLUMNS))
    paces[:, _DECODE:_NOT_SEEN_FOR] = c.UNKNOWN
    return paces


@compiled
def chunk_tokens(pace: Floats, rows: int, step_tokens: int, slowdown_max: float, free_ms: float) -> int:
    """Tokens of prompts for a step in which `rows` sequences decode."""
    if rows == 0:
        return step_tokens
    kind = _bits(rows)
    decode_ms = pace[_DECODE + kind]
    if decode_ms < 0.0 or pace[_NOT_SEEN_FOR + kind] >= _LOOK_AGAIN:
        return 0
    tokens = 0.0
    if pace[_TOKENS]:
        allowed_ms = max(slowdown_max * decode_ms, free_ms) - decode_ms
        tokens = pace[_TOKENS] + (allowed_ms - pace[_MS]) / _token_ms(pace)
    whole = int(min(tokens, float(step_tokens))) // CHUNK_TOKENS_MIN * CHUNK_TOKENS_MIN
    return max(whole, CHUNK_TOKENS_MIN)


@compiled
def note_step(pace: Floats, rows: int, tokens: int, took_ms: float) -> None:
    """Learns from a step that decoded `rows` sequences and computed `tokens` tokens of prompts."""
    kind = _bits(rows)
    if tokens == 0:
        pace[_DECODE + kind] = _averaged(pace[_DECODE + kind], took_ms)
        pace[_NOT_SEEN_FOR + kind] = 0.0
        return
    decode_ms = 0.0
    if rows:
        pace[_NOT_SEEN_FOR + kind] += 1.0
        decode_ms = max(pace[_DECODE + kind], 0.0)
    _note_cost(pace, tokens, max(took_ms - decode_ms, _SHARE_MIN * took_ms, _LEAST))


@compiled
def _note_cost(pace: Floats, tokens: int, ms: float) -> None:
    if not pace[_TOKENS]:
        pace[_TOKENS], pace[_MS] = float(tokens), ms
        return
    expected_ms = pace[_MS] + _token_ms(pace) * (tokens - pace[_TOKENS])
    ms = min(max(ms, expected_ms / _OUTLIER), expected_ms * _OUTLIER)
    off_tokens, off_ms = tokens - pace[_TOKENS], ms - pace[_MS]
    pace[_SPREAD] += _SLOPE_WEIGHT * (off_tokens * off_tokens - pace[_SPREAD])
    pace[_RISE] += _SLOPE_WEIGHT * (off_tokens * off_ms - pace[_RISE])
    pace[_TOKENS] += _WEIGHT * off_tokens
    pace[_MS] += _WEIGHT * off_ms


@compiled
def _token_ms(pace: Floats) -> float:
    share_ms: float = pace[_MS] / pace[_TOKENS]
    if not pace[_SPREAD]:
        return share_ms
    token_ms: float = min(max(pace[_RISE] / pace[_SPREAD], _TOKEN_SHARE_MIN * share_ms), share_ms)
    return token_ms


@compiled
def _averaged(known: float, sample: float) -> float:
    if known <= 0.0:
        return sample
    return known + _WEIGHT * (min(max(sample, known / _OUTLIER), known * _OUTLIER) - known)


@compiled
def _bits(number: int) -> int:
    bits = 0
    while number:
        number >>= 1
        bits += 1
    return bits
