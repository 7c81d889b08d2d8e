"""How many tokens a step needs until more of them make it no faster per token: measured by a few short passes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from zipserve.engine.engine import Engine
from zipserve.engine.sequence import Segment, Sequence

STEP_TOKENS = (64, 128, 256, 512)
_SHARE = 0.95
"""Of the best rate, which the chosen step must reach."""
_TIME_S = 1.5
_ROUNDS = 2


@dataclass(frozen=True)
class Saturation:
    """Where a step is saturated."""

    step_tokens: int
    tokens_per_s: float


def choose(seconds: dict[int, float]) -> Saturation:
    """The smallest step that reaches nearly the best rate.

    Args:
        seconds: time of a step by its tokens; at least one.
    """
    rates = {tokens: tokens / max(taken, 1e-9) for tokens, taken in seconds.items()}
    enough = _SHARE * max(rates.values())
    tokens = min(tokens for tokens, rate in rates.items() if rate >= enough)
    return Saturation(tokens, rates[tokens])


def measure(engine: Engine, clock: Callable[[], float] = time.perf_counter, time_s: float = _TIME_S) -> Saturation:
    """Measures an engine whose cache nobody uses yet, in `time_s` seconds after a warm-up.

    Every size is run twice where there is time, and its faster run counts. A size is left out when it does not fit the
    cache or the model, or would not end in time.
    """
    smallest = min(STEP_TOKENS[0], _fitting(engine))
    _pass_s(engine, smallest, clock)
    ends_s = clock() + time_s
    seconds = {smallest: _pass_s(engine, smallest, clock)}
    for _ in range(_ROUNDS):
        for tokens in STEP_TOKENS:
            expected_s = seconds.get(tokens) or seconds[max(seconds)] * tokens / max(seconds)
            if tokens <= _fitting(engine) and clock() + expected_s <= ends_s:
                seconds[tokens] = min(_pass_s(engine, tokens, clock), seconds.get(tokens, float("inf")))
    return choose(seconds)


def _fitting(engine: Engine) -> int:
    """Most tokens of a sequence that has the whole cache."""
    cache = engine.cache
    room = (cache.blocks + 1) * cache.layout.block_tokens - 1
    return min(room, engine.model.context_tokens)


def _pass_s(engine: Engine, tokens: int, clock: Callable[[], float]) -> float:
    sequence = Sequence(list(range(tokens // engine.cache.layout.block_tokens)), slot=0, sinks=0)
    started_s = clock()
    engine.forward([Segment(sequence, [0] * tokens)])
    return clock() - started_s
