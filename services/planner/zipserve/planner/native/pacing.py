"""How many tokens of prompts a decode worker adds to a step: what it learns, and what it makes of that. Compiled.

The rule of the decode worker's own `pacing.py`, number by number: what it has learned when a prompt comes depends on
the steps before, and converges to no constant while prompts and batches differ.
"""

import numpy as np
from numpy.typing import NDArray

from zipserve.planner.native.compiled import compiled

Floats = NDArray[np.float64]

CHUNK_TOKENS_MIN = 4
_WEIGHT = 0.3
_OUTLIER = 3.0
_SHARE_MIN = 0.05
"""Of a step with prompts that is put down to them at least."""
_LEAST = 1e-9


@compiled
def chunk_tokens(paces_ms: Floats, rows: int, step_tokens: int, slowdown_max: float) -> int:
    """Tokens of prompts for a step in which `rows` sequences decode."""
    if rows == 0:
        return step_tokens
    decode_ms = paces_ms[_bits(rows)]
    if decode_ms < 0.0:
        return 0
    tokens = 0.0 if paces_ms[0] < 0.0 else (slowdown_max - 1) * decode_ms / paces_ms[0]
    whole = int(min(tokens, float(step_tokens))) // CHUNK_TOKENS_MIN * CHUNK_TOKENS_MIN
    return max(whole, CHUNK_TOKENS_MIN)


@compiled
def note_step(paces_ms: Floats, rows: int, tokens: int, took_ms: float) -> None:
    """Learns from a step that decoded `rows` sequences and computed `tokens` tokens of prompts."""
    kind = _bits(rows)
    if tokens == 0:
        paces_ms[kind] = _averaged(paces_ms[kind], took_ms)
        return
    decode_ms = max(paces_ms[kind], 0.0) if rows else 0.0
    paces_ms[0] = _averaged(paces_ms[0], max(took_ms - decode_ms, _SHARE_MIN * took_ms, _LEAST) / tokens)


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
