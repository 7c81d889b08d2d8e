"""What a cluster has to keep: limits on the times of requests, for a share of them, jointly or one by one, of all
requests or of a class. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native import columns as c
from zipserve.planner.native.lateness import Goal, goal_of
from zipserve.planner.native.simulation import Outcome
from zipserve.planner.native.traffic import Traffic


@dataclass(frozen=True)
class Objective:
    """A share of the requests keeps all of these limits, each inclusive; infinite ones are none. What the router
    refuses keeps none. A percentile of one time by itself is an objective with that limit only."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf
    gap_ms: float = math.inf
    """On the largest gap between two tokens of a request."""
    e2e_ms: float = math.inf
    share: float = 0.9
    of: int | None = None
    """Class; None: all requests."""

    def __post_init__(self) -> None:
        limits = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "gap": self.gap_ms, "e2e": self.e2e_ms}
        _check(limits, self.share)

    @property
    def limits_ms(self) -> tuple[float, ...]:
        """As a goal has them."""
        return self.ttft_ms, self.tpot_ms, self.gap_ms, self.e2e_ms, math.inf

    def attained(self, outcome: Outcome) -> float:
        """Share of the requests that keep all limits."""
        times = outcome.ttft_ms, outcome.tpot_ms, outcome.gap_max_ms, outcome.e2e_ms
        pairs = zip(times, self.limits_ms, strict=False)
        kept = np.logical_and.reduce([time <= limit for time, limit in pairs if limit < math.inf])
        return float(np.mean(kept[_of(self.of, outcome.traffic)]))

    def misses_max(self, traffic: Traffic) -> int:
        """With more late requests it is missed."""
        return _misses_max(self.share, int(_of(self.of, traffic).sum()))


@dataclass(frozen=True)
class GapObjective:
    """A share of all gaps between tokens keeps a limit, inclusive: a percentile of the gaps, whoever has them. All gaps
    of a request that is refused are late."""

    gap_ms: float
    share: float = 0.99
    of: int | None = None
    """Class; None: all requests."""

    def __post_init__(self) -> None:
        _check({"gap": self.gap_ms}, self.share)

    @property
    def limits_ms(self) -> tuple[float, ...]:
        """As a goal has them."""
        return math.inf, math.inf, math.inf, math.inf, self.gap_ms

    def attained(self, outcome: Outcome) -> float:
        """Share of the gaps that keep the limit."""
        total = outcome.traffic.outputs[_of(self.of, outcome.traffic)].sum()
        return float((outcome.gaps_ms(self.of) <= self.gap_ms).sum() / total)

    def misses_max(self, traffic: Traffic) -> int:
        """With more late gaps it is missed."""
        return _misses_max(self.share, int(traffic.outputs[_of(self.of, traffic)].sum()))


@dataclass(frozen=True)
class Slo:
    """Objectives that have to be kept all."""

    objectives: tuple[Objective | GapObjective, ...]

    def __init__(self, *objectives: Objective | GapObjective) -> None:
        if not 1 <= len(objectives) <= OBJECTIVES_MAX:
            raise InvalidRequestError(
                f"there are {len(objectives)} objectives, from 1 to {OBJECTIVES_MAX} can be kept", field="slo"
            )
        object.__setattr__(self, "objectives", objectives)

    def kept(self, outcome: Outcome) -> bool:
        """Whether a complete run keeps them all."""
        return all(one.attained(outcome) >= one.share for one in self.objectives)

    def goal(self, traffic: Traffic) -> Goal:
        """When a run of this traffic may be given up.

        Raises:
            InvalidRequestError: an objective is for a class that has no requests.
        """
        return goal_of(
            np.array([one.limits_ms for one in self.objectives]),
            np.array([c.NONE if one.of is None else one.of for one in self.objectives], np.int64),
            np.array([one.misses_max(traffic) for one in self.objectives], np.int64),
        )


OBJECTIVES_MAX = 62
"""Each has a bit in a number."""


def _check(limits_ms: dict[str, float], share: float) -> None:
    for name, limit_ms in limits_ms.items():
        if not limit_ms > 0:
            raise InvalidRequestError(
                f"the limit on {name.upper()} is {limit_ms:g} ms, not above 0", field=f"slo_{name}"
            )
    if not any(limit_ms < math.inf for limit_ms in limits_ms.values()):
        raise InvalidRequestError("an objective without a limit is none", field="slo")
    if not 0 < share <= 1:
        raise InvalidRequestError(f"a share of {share:g} is not in (0, 1]", field="share")


def _of(of: int | None, traffic: Traffic) -> NDArray[np.bool_]:
    if of is None:
        return np.ones(len(traffic), np.bool_)
    mine: NDArray[np.bool_] = traffic.classes == of
    if not mine.any():
        raise InvalidRequestError(
            f"class {of} has no requests, there are {_some(set(traffic.classes.tolist()))}", field="of"
        )
    return mine


def _some(classes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(classes)[:10]))


def _misses_max(share: float, count: int) -> int:
    """Of so many, how many may be late."""
    met = math.ceil(share * count)
    while met and (met - 1) / count >= share:
        met -= 1
    return count - met
