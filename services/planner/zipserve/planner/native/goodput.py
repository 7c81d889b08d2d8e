"""How much a cluster serves within its objectives: the highest rate, over several draws of the arrivals. Pure.

Draws are the same for every cluster and every rate, so that two clusters are compared on the same requests, and what
differs is theirs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.goodput import highest_rate
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.objectives import Objective, Slo
from zipserve.planner.native.simulation import Outcome, play, simulate
from zipserve.planner.native.traffic import Traffic, extras
from zipserve.planner.trace import draw_gaps
from zipserve.planner.workload import Workload

SEEDS = (0, 1, 2, 3, 4)
_IDLE_RATE = 1e-3
"""Requests per second so few that, evenly spread, none meets another."""
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % quantiles of Student's distribution, from 1 degree of freedom on."""
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Goodput:
    """Requests per second that a cluster serves within its objectives."""

    rates: tuple[float, ...]
    """By seed."""
    why: str = ""
    """If they are all 0: what stands against it."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.rates))

    @property
    def half_width(self) -> float:
        """Of the 95 % confidence interval of the mean; infinite for one seed."""
        freedom = len(self.rates) - 1
        if not freedom:
            return math.inf
        quantile = _T_95[freedom - 1] if freedom <= len(_T_95) else _NORMAL_95
        return float(quantile * np.std(self.rates, ddof=1) / math.sqrt(freedom + 1))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the mean."""
        return max(0.0, self.mean - self.half_width), self.mean + self.half_width


def goodput(
    cluster: Cluster,
    workload: Workload,
    slo: Slo,
    rate_max: float,
    seeds: Sequence[int] = SEEDS,
    arrivals: str = "poisson",
) -> Goodput:
    """The highest rate at which a cluster keeps its objectives, for each draw of the arrivals.

    Args:
        rate_max: requests per second up to which is searched, in steps of a 256th.
        arrivals: poisson, gamma, or replay: the workload's own gaps, from another request on for each seed.

    Raises:
        InvalidRequestError: a request can never be served, an objective is for nobody, or there is nothing to search.
    """
    if not (rate_max > 0 and math.isfinite(rate_max)):
        raise InvalidRequestError(f"rates up to {rate_max:g} per second are none", field="rate_max")
    if not seeds:
        raise InvalidRequestError("there are no seeds to draw arrivals from", field="seeds")
    rates = tuple(
        highest_rate(lambda rate, load=load: passes(cluster, load, rate, slo), rate_max)  # type: ignore[misc]
        for load in (drawn(workload, seed, len(seeds), arrivals) for seed in seeds)
    )
    return Goodput(rates, "" if any(rates) else obstacle(cluster, workload, slo, rate_max))


def passes(cluster: Cluster, workload: Workload, rate: float, slo: Slo) -> bool:
    """Whether a cluster keeps its objectives at `rate` requests per second; gives up as soon as it cannot.

    Raises:
        InvalidRequestError: see `goodput`.
    """
    return play(cluster, workload, rate, slo.goal(extras(workload)))[1]


def drawn(workload: Workload, seed: int, seeds: int, arrivals: str) -> Traffic:
    """The same requests with gaps of their own for each seed. Those of a replay are not drawn: it goes round, and
    begins at another request for each of `seeds`.

    Raises:
        InvalidRequestError: there are no such arrivals.
    """
    load = extras(workload)
    if arrivals != "replay":
        return replace(load, unit_gaps=draw_gaps(arrivals, len(load), np.random.default_rng(seed)))
    order = np.roll(np.arange(len(load)), -(seed % seeds * len(load) // seeds))
    mean = float(load.unit_gaps[1:].mean()) if len(load) > 1 else 0.0
    whole = load.unit_gaps.copy()
    whole[0] = mean  # from the last request round to the first
    gaps = whole[order]
    gaps[0] = 0.0
    if (sum_now := float(gaps.sum())) > 0:
        gaps *= mean * (len(load) - 1) / sum_now  # as fast as the whole, wherever it begins
    columns = {name: getattr(load, name)[order] for name in ("prompts", "outputs", "cached", "found", "classes")}
    return replace(load, unit_gaps=gaps, **columns)


def obstacle(cluster: Cluster, workload: Workload, slo: Slo, rate_max: float) -> str:
    """What stands against any goodput: the limit that is not kept even with nothing else running, if there is one."""
    load = extras(workload)
    alone = simulate(cluster, replace(load, unit_gaps=np.ones(len(load))), _IDLE_RATE)
    for one in slo.objectives:
        if one.attained(alone) < one.share:
            return (
                _missed(one, alone)
                if isinstance(one, Objective)
                else (
                    f"with nothing else running {one.share * 100:g} % of the gaps are at most "
                    f"{float(alone.gap_quantiles_ms(one.share, one.of)):.4g} ms, the limit is {one.gap_ms:g} ms"
                )
            )
    return f"the objectives are kept with nothing else running, not at the lowest rate tried, {rate_max / 256:g}/s"


def _missed(objective: Objective, alone: Outcome) -> str:
    """The limit that by itself is missed by most."""
    mine = np.ones(len(alone.traffic), np.bool_) if objective.of is None else alone.traffic.classes == objective.of
    times = {
        "TTFT": alone.ttft_ms,
        "TPOT": alone.tpot_ms,
        "largest gap": alone.gap_max_ms,
        "end to end time": alone.e2e_ms,
    }
    limits = dict(zip(times, objective.limits_ms, strict=False))
    worst = min(times, key=lambda name: float(np.mean(times[name][mine] <= limits[name])))
    reached_ms = float(np.quantile(times[worst][mine], objective.share))
    return (
        f"with nothing else running {objective.share * 100:g} % of the requests have a {worst} of at most "
        f"{reached_ms:.4g} ms, the limit is {limits[worst]:g} ms"
    )
