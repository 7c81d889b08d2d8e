"""The bars of `zipserve bench goodput`, for as much as was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zipserve.bench.goodput.search import Goodput
from zipserve.bench.report import Check

RIVAL = "vLLM "
"""What the names of its arrangements begin with."""
APART = "apart"
BEST_GAIN = 2.0
APART_GAIN = 2.5
_LAG_MAX_MS = 100.0


def checks(
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
    goodputs: Mapping[str, tuple[int, Goodput]],
    *,
    decides: bool,
) -> list[Check]:
    """No request fails, the client keeps to the schedule (it shares the cores with the servers), rivals are beaten."""
    ours = {name: goodput.rate for name, (_, goodput) in goodputs.items() if not name.startswith(RIVAL)}
    theirs = {name: goodput.rate for name, (_, goodput) in goodputs.items() if name.startswith(RIVAL)}
    failed = sum(run["failed"] for name in ours for run in figures[name])
    lags = [run["lag_ms"]["p99"] for runs in figures.values() for run in runs]
    found = [
        Check("failed requests", failed, "<=", 0.0),
        Check("schedule lag p99, worst run [ms]", max(lags, default=math.nan), "<=", _LAG_MAX_MS, decides),
    ]
    if ours and theirs:
        gain = _gain(max(ours.values()), max(theirs.values()))
        found.append(Check("best arrangement, times vLLM's best goodput", gain, ">=", BEST_GAIN, decides))
    apart = [rate for name, rate in ours.items() if name.startswith(APART)]
    apart_of_rival = [rate for name, rate in theirs.items() if name.startswith(RIVAL + APART)]
    if apart and apart_of_rival:
        gain = _gain(max(apart), max(apart_of_rival))
        found.append(Check("prefill and decode apart, times vLLM's", gain, ">=", APART_GAIN, decides))
    return found


def _gain(ours: float, theirs: float) -> float:
    """NaN where neither bears any rate that was measured."""
    if theirs:
        return ours / theirs
    return math.inf if ours else math.nan
