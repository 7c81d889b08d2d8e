"""The bars of `zipserve bench goodput`, for as much as was measured."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
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
    """No request fails, the client keeps to the schedule (it shares the cores with the servers), rivals are beaten.

    Goodputs are compared per device, as not all arrangements use equally many.
    """
    ours = {name: of for name, of in goodputs.items() if not name.startswith(RIVAL)}
    theirs = {name: of for name, of in goodputs.items() if name.startswith(RIVAL)}
    lags = [run["lag_ms"]["p99"] for runs in figures.values() for run in runs]
    found = [
        Check("failed requests", _failed(figures, ours), "<=", 0.0),
        Check("schedule lag p99, worst run [ms]", max(lags, default=math.nan), "<=", _LAG_MAX_MS, decides),
    ]
    if theirs:
        found.append(Check("failed requests of vLLM", _failed(figures, theirs), "<=", 0.0))
    if ours and theirs:
        gain = _gain(ours.values(), theirs.values())
        found.append(Check("best arrangement, times vLLM's best goodput, per device", gain, ">=", BEST_GAIN, decides))
    apart = [of for name, of in ours.items() if name.startswith(APART)]
    apart_of_rival = [of for name, of in theirs.items() if name.startswith(RIVAL + APART)]
    if apart and apart_of_rival:
        gain = _gain(apart, apart_of_rival)
        found.append(Check("prefill and decode apart, times vLLM's, per device", gain, ">=", APART_GAIN, decides))
    return found


def _failed(figures: Mapping[str, Sequence[Mapping[str, Any]]], names: Iterable[str]) -> int:
    return sum(run["failed"] for name in names for run in figures[name])


def _gain(ours: Iterable[tuple[int, Goodput]], theirs: Collection[tuple[int, Goodput]]) -> float:
    """How many times theirs ours is at least, the best of each, per device; NaN where it cannot be told, as theirs bear
    no rate that was measured, or one bears every rate."""
    most = max(goodput.most / devices for devices, goodput in theirs)
    if math.isinf(most) or not any(goodput.rate for _, goodput in theirs):
        return math.nan
    return max(goodput.rate / devices for devices, goodput in ours) / most
