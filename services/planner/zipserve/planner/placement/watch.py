"""Whether what arrives is still what a plan was made for, and what a new plan would change. Pure."""

import difflib
from dataclasses import dataclass, replace

from scipy.stats import ks_2samp

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.goodput import goodput
from zipserve.planner.native.traffic import Traffic
from zipserve.planner.placement.router_log import Logged
from zipserve.planner.placement.search import Found, Question, Ranking, highest, search
from zipserve.planner.placement.values import as_yaml, values

_SURE = 0.01
"""Lengths are others if a Kolmogorov-Smirnov test would tell so of equal ones this seldom,"""
_DISTANCE = 0.1
"""and if their distributions differ by that much somewhere: of many requests any difference is sure."""
_RATE = 1.2
"""The rate is another if it is so many times higher or lower."""
LOOKS = 3
"""A shift has to be seen so many times, one after the other."""
GAIN = 1.1
"""A new plan has to serve so many times what the present one does, or cost so many times less."""


@dataclass(frozen=True)
class News:
    """Of one look."""

    shifts: tuple[str, ...]
    """What has changed, in words; none: nothing."""
    replan: str = ""
    """The change of the chart's values, as a diff; empty: none."""


class Watch:
    """Compares what comes with what the present plan was made for. A plan is changed late rather than often.

    Args:
        question: with a rate; headroom is in it already.
        ranking: its answer.
        headroom: how many times the rate that comes a new plan is made for.
    """

    def __init__(self, question: Question, ranking: Ranking, rate: float, headroom: float) -> None:
        self._question = question
        self._traffic, self._rate = question.traffic, rate
        self._present = _best(ranking)
        self._headroom = headroom
        self._seen = 0

    def look(self, logged: Logged) -> News:
        """Looks at the latest requests; plans anew when a shift has stayed.

        Raises:
            InvalidRequestError: nothing would keep the limits with what comes now; the present plan stays.
        """
        shifts = shifts_between(self._traffic, self._rate, logged)
        self._seen = self._seen + 1 if shifts else 0
        if self._seen < LOOKS:
            return News(shifts)
        self._seen = 0
        asked = replace(self._question, traffic=logged.traffic, rate=self._headroom * logged.rate)
        found = _best(search(asked))
        self._traffic, self._rate = logged.traffic, logged.rate
        if not self._is_better(found, asked):
            return News(shifts)
        diff = _diff(self._present, found)
        self._present = found
        return News(shifts, diff)

    def _is_better(self, found: Found, asked: Question) -> bool:
        """Whether changing is worth it: the present one does not serve what comes, or costs much more than it must."""
        assert asked.rate is not None
        try:
            candidate = self._present.candidate
            rate_max = 2 * highest(candidate, asked, asked.traffic)  # of other draws of the gaps
            now = goodput(candidate.cluster, asked.traffic, asked.slo, rate_max, asked.seeds, asked.arrivals).mean
        except InvalidRequestError:  # a request does not fit at all
            now = 0.0
        if now < asked.rate:
            return found.rate > GAIN * now
        return found.rate >= asked.rate and self._present.cost > GAIN * found.cost


def shifts_between(traffic: Traffic, rate: float, logged: Logged) -> tuple[str, ...]:
    """What differs between two loads, in words."""
    found = []
    for name, before, now in (
        ("prompts", traffic.prompts - traffic.cached, logged.traffic.prompts - logged.traffic.cached),
        ("answers", traffic.outputs, logged.traffic.outputs),
    ):
        test = ks_2samp(before, now)
        if test.pvalue < _SURE and test.statistic > _DISTANCE:
            found.append(f"{name} of {now.mean():.4g} tokens on average instead of {before.mean():.4g}")
    if not 1 / _RATE <= logged.rate / rate <= _RATE:
        found.append(f"{logged.rate:.3g} requests/s instead of {rate:.3g}")
    return tuple(found)


def _best(ranking: Ranking) -> Found:
    best = ranking.best()
    assert best is not None  # a search raises if there is none
    return best


def _diff(before: Found, now: Found) -> str:
    old, new = (as_yaml(values(one.candidate), str(one.candidate)).splitlines(keepends=True) for one in (before, now))
    return "".join(difflib.unified_diff(old, new, "values.yaml (present)", "values.yaml (planned)"))
