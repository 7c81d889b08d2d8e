"""How many tokens a step needs until more of them make it no faster per token: measured by a few short passes.

Passes share the machine with whatever else runs on it, and what they find holds for the life of the process. So all
sizes are run in turn, several times over, and the usual size stands unless every turn speaks against it.
"""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from zipserve.engine.engine import Engine
from zipserve.engine.sequence import Segment, Sequence

STEP_TOKENS = (64, 128, 256, 512)
STEP_TOKENS_DEFAULT = 256
"""Saturates nearly every machine, and its steps are still short."""
_SHARE = 0.95
"""Of the best rate, which the chosen step must reach."""
_TIME_S = 2.0
_ROUNDS_MIN = 3
"""Fewer rounds say nothing."""
_ROUNDS_MAX = 5


@dataclass(frozen=True)
class Saturation:
    """Where a step is saturated."""

    step_tokens: int
    tokens_per_s: float | None
    """Median of the rounds; None where there was no time for them."""


def choose(rounds: SequenceOf[Mapping[int, float]], default: int = STEP_TOKENS_DEFAULT) -> Saturation:
    """The size that is nearest to the default among those that a round finds best: the smallest with nearly its best
    rate. Sizes on both sides of the default leave it as it is, and so do too few rounds.

    Args:
        rounds: time of a step by its tokens, the same sizes in each, the default among them.
    """
    if len(rounds) < _ROUNDS_MIN:
        return Saturation(default, None)
    found = [_smallest_with_nearly_the_best_rate(seconds) for seconds in rounds]
    tokens = min(max(default, min(found)), max(found))
    taken = sorted(seconds[tokens] for seconds in rounds)
    return Saturation(tokens, tokens / max(taken[len(taken) // 2], 1e-9))


def measure(engine: Engine, clock: Callable[[], float] = time.perf_counter, time_s: float = _TIME_S) -> Saturation:
    """Measures an engine whose cache nobody uses yet, in `time_s` seconds after a warm-up.

    Sizes that do not fit the cache or the model are left out; so are those above the default where there is no time
    for them.
    """
    fitting = _fitting(engine)
    sizes = [tokens for tokens in STEP_TOKENS if tokens <= fitting]
    default = max((tokens for tokens in sizes if tokens <= STEP_TOKENS_DEFAULT), default=fitting)
    if len(sizes) < 2:
        return Saturation(default, None)
    _pass_s(engine, sizes[0], clock)
    ends_s = clock() + time_s
    token_s = _pass_s(engine, sizes[0], clock) / sizes[0]
    while sizes[-1] > default and _ROUNDS_MIN * sum(sizes) * token_s > time_s:
        sizes.pop()
    if _ROUNDS_MIN * sum(sizes) * token_s > time_s:
        return Saturation(default, None)
    rounds: list[dict[int, float]] = []
    while len(rounds) < _ROUNDS_MAX and clock() + sum(sizes) * token_s <= ends_s:
        rounds.append({tokens: _pass_s(engine, tokens, clock) for tokens in sizes})
    return choose(rounds, default)


def _smallest_with_nearly_the_best_rate(seconds: Mapping[int, float]) -> int:
    rates = {tokens: tokens / max(taken, 1e-9) for tokens, taken in seconds.items()}
    return min(tokens for tokens, rate in rates.items() if rate >= _SHARE * max(rates.values()))


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
