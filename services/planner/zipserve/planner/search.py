"""Finds the placement with the most goodput per device: bounds say where to look first and where not at all, the
simulation decides. Pure.

Source: DistServe (OSDI'24), Algorithms 1 and 2.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.bounds import ceiling, tpot_floor_ms, ttft_floor_ms
from zipserve.planner.goal import Slo
from zipserve.planner.goodput import highest_rate
from zipserve.planner.simulation import Placement, passes
from zipserve.planner.space import Devices, Shape, Space
from zipserve.planner.workload import Workload

_IDLE_RATE = 1e-9
"""Requests per second so few that none meets another."""


@dataclass(frozen=True)
class Candidate:
    """A placement that was looked at."""

    placement: Placement
    ceiling: float
    """Requests per second and device that it cannot exceed."""
    goodput: float | None
    """Requests per second and device; None: it was not simulated, because its ceiling is below the best one found."""
    idle_ttft_ms: float = 0.0
    """What the wanted share of the requests takes at least, with nothing else running."""
    idle_tpot_ms: float = 0.0
    why: str = ""
    """If its goodput is 0: what stands against it."""

    @property
    def rank(self) -> tuple[float, int, Shape]:
        """Sorts the best first: the most goodput, then the fewest devices, then the lowest parallelism."""
        return -(self.goodput or 0.0), self.placement.devices, self.placement.shape


@dataclass
class Ranking:
    """The outcome of a search."""

    candidates: list[Candidate] = field(default_factory=list)
    """Simulated ones first, best first."""
    infeasible: list[tuple[Shape, str]] = field(default_factory=list)

    @property
    def best(self) -> Candidate | None:
        """None if nothing keeps the objectives at any rate."""
        first = self.candidates[0] if self.candidates else None
        return first if first is not None and first.goodput else None


def rank(space: Space, workload: Workload, slo: Slo, rate_max: float, *, prune: bool = True) -> Ranking:
    """Goodput of all placements of a space.

    Args:
        rate_max: requests per second and device up to which is searched, in steps of a 256th.
        prune: leave out what cannot win. The best one is the same.
    """
    order = [_candidate(placement, workload, slo, rate_max, bounded=prune) for placement in space.placements]
    order.sort(key=lambda candidate: (-candidate.ceiling, candidate.placement.devices, candidate.placement.shape))
    ranking = Ranking(infeasible=space.infeasible)
    skipped = []
    best: Candidate | None = None
    for candidate in order:
        if prune and candidate.ceiling and _cannot_win(candidate, best):
            skipped.append(candidate)
            continue
        found = replace(candidate, goodput=_goodput(candidate, workload, slo, rate_max))
        if not found.goodput:
            found = replace(found, why=_why(found, slo, rate_max))
        ranking.candidates.append(found)
        best = found if best is None else min(best, found, key=lambda one: one.rank)
    ranking.candidates.sort(key=lambda one: one.rank)
    ranking.candidates += skipped
    return ranking


def goodput(placement: Placement, workload: Workload, slo: Slo, rate_max: float) -> float:
    """Requests per second and device up to which a placement keeps its objectives, at most `rate_max`."""
    return _goodput(_candidate(placement, workload, slo, rate_max, bounded=True), workload, slo, rate_max)


@dataclass(frozen=True)
class Deployment:
    """Copies of placements that share the requests."""

    parts: tuple[tuple[int, Placement], ...]
    rate: float
    """Requests per second that it can serve within the objectives."""
    attained: float | None = None
    """Share of the requests that keep both limits at the wanted rate, or else at that one, where phases were searched
    apart and then simulated together; None: they were searched together."""

    @property
    def devices(self) -> int:
        """How many it occupies."""
        return sum(copies * placement.devices for copies, placement in self.parts)

    @property
    def goodput(self) -> float:
        """Requests per second and device."""
        return self.rate / self.devices


def copies(candidate: Candidate, devices: Devices, rate: float | None) -> Deployment:
    """As many copies of one placement as `rate` requests per second need; None: one.

    Raises:
        InvalidRequestError: the devices do not suffice.
    """
    each = (candidate.goodput or 0.0) * candidate.placement.devices
    count = 1 if rate is None else math.ceil(rate / each)
    return _within(Deployment(((count, candidate.placement),), count * each), devices, rate)


def copies_apart(prefills: Ranking, decodes: Ranking, devices: Devices, rate: float | None) -> Deployment:
    """Algorithm 1's last step: as many copies of the best instance of each phase as `rate` requests per second need.

    Args:
        rate: None: of all instances and ratios that the devices hold, those that serve the most requests per device.

    Raises:
        InvalidRequestError: the devices do not suffice.
    """
    if rate is not None:
        best = [_Phase.of(ranking.candidates[0]) for ranking in (prefills, decodes)]
        return _within(_together(*((math.ceil(rate / one.rate), one) for one in best)), devices, rate)
    found = [
        _together((prefill_count, prefill), (decode_count, decode))
        for prefill in map(_Phase.of, prefills.candidates)
        for decode in map(_Phase.of, decodes.candidates)
        for prefill_count in range(1, devices.total // prefill.size + 1)
        for decode_count in range(1, (devices.total - prefill_count * prefill.size) // decode.size + 1)
    ]
    if not found:
        raise InvalidRequestError(
            f"a prefill and a decode instance need more than the {devices.total} devices that are there",
            field="devices",
        )
    return max(found, key=lambda deployment: (deployment.goodput, -deployment.devices))


def unreachable(ranking: Ranking, slo: Slo) -> InvalidRequestError:
    """The error that says which objective nothing meets, or why there is nothing that could."""
    if not ranking.candidates:
        reasons = dict.fromkeys(why for _, why in ranking.infeasible) or ["there are too few devices for any"]
        return InvalidRequestError(f"no placement is feasible: {'; '.join(reasons)}", field="devices")
    for name, limit_ms, least in (
        ("ttft", slo.ttft_ms, min(ranking.candidates, key=lambda one: one.idle_ttft_ms)),
        ("tpot", slo.tpot_ms, min(ranking.candidates, key=lambda one: one.idle_tpot_ms)),
    ):
        if getattr(least, f"idle_{name}_ms") >= limit_ms:
            return InvalidRequestError(
                f"no placement meets {name.upper()} {limit_ms:g} ms; the fastest, {least.placement.shape}: {least.why}",
                field=f"slo_{name}",
            )
    best = ranking.candidates[0]
    return InvalidRequestError(f"no placement keeps the limits; {best.placement.shape}: {best.why}", field="rate_max")


def _candidate(placement: Placement, workload: Workload, slo: Slo, rate_max: float, *, bounded: bool) -> Candidate:
    percentile = slo.attainment * 100
    return Candidate(
        placement,
        ceiling(placement, workload, slo, rate_max) if bounded else rate_max,
        None,
        float(np.percentile(ttft_floor_ms(placement, workload, _IDLE_RATE), percentile)),
        float(np.percentile(tpot_floor_ms(placement, workload), percentile)),
    )


def _why(candidate: Candidate, slo: Slo, rate_max: float) -> str:
    share = f"{slo.attainment * 100:g} % of the requests"
    for name, limit_ms, idle_ms in (
        ("TTFT", slo.ttft_ms, candidate.idle_ttft_ms),
        ("TPOT", slo.tpot_ms, candidate.idle_tpot_ms),
    ):
        if idle_ms >= limit_ms:
            return f"with nothing else running {share} have a {name} of {idle_ms:.4g} ms, the limit is {limit_ms:g} ms"
    return (
        f"fewer than {share} keep the limits, even at the lowest rates tried, from {rate_max / 256:g}/s per device on"
    )


def _goodput(candidate: Candidate, workload: Workload, slo: Slo, rate_max: float) -> float:
    placement = candidate.placement

    def keeps(rate: float) -> bool:
        return rate <= candidate.ceiling and passes(placement, workload, rate * placement.devices, slo)

    return highest_rate(keeps, rate_max)


def _cannot_win(candidate: Candidate, best: Candidate | None) -> bool:
    if best is None:
        return False
    return replace(candidate, goodput=candidate.ceiling).rank > best.rank


class _Phase(NamedTuple):
    """An instance of one phase."""

    placement: Placement
    size: int
    """Devices."""
    rate: float
    """Requests per second that it serves."""

    @classmethod
    def of(cls, candidate: Candidate) -> "_Phase":
        size = candidate.placement.devices
        return cls(candidate.placement, size, (candidate.goodput or 0.0) * size)


def _together(*parts: tuple[int, _Phase]) -> Deployment:
    rate = min(count * phase.rate for count, phase in parts)
    return Deployment(tuple((count, phase.placement) for count, phase in parts), rate)


def _within(deployment: Deployment, devices: Devices, rate: float | None) -> Deployment:
    if deployment.devices > devices.total:
        wanted = "" if rate is None else f"{rate:g} requests/s need "
        parts = " + ".join(f"{count} × {placement.devices}" for count, placement in deployment.parts)
        raise InvalidRequestError(
            f"{wanted}{parts} = {deployment.devices} devices, {devices.total} are there", field="devices"
        )
    return deployment
