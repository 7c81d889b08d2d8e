"""Finds the candidate that serves most within limits for what it costs: ceilings say where to look first and where not
at all, the simulation decides. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.goodput import SEEDS, Goodput, drawn, goodput
from zipserve.planner.native.objectives import Slo
from zipserve.planner.native.profile import WorkerProfile
from zipserve.planner.native.traffic import Traffic
from zipserve.planner.native.workers import FREE_MS_DEFAULT
from zipserve.planner.placement.candidate import APART, TOGETHER, Candidate, Refused, Settings, candidates
from zipserve.planner.placement.ceiling import ceiling
from zipserve.planner.placement.fleet import Fleet


@dataclass(frozen=True, eq=False)
class Question:
    """What is planned for."""

    profiles: Sequence[WorkerProfile]
    fleet: Fleet
    traffic: Traffic
    slo: Slo
    rate_max: float
    """Requests per second and device up to which is searched where no bound is known."""
    rate: float | None = None
    """Requests per second that have to be served for as little as can be; None: most for a unit of cost."""
    seeds: Sequence[int] = SEEDS
    arrivals: str = "poisson"
    prefill_settings: Sequence[Settings] = (Settings(),)
    decode_settings: Sequence[Settings] = (Settings(),)
    free_ms_to_try: Sequence[float] = (FREE_MS_DEFAULT,)
    prune: bool = True


@dataclass(frozen=True, eq=False)
class Found:
    """A candidate that was looked at."""

    candidate: Candidate
    cost: float
    """For an hour."""
    ceiling: float
    """Requests per second that it cannot exceed, over the seeds."""
    rate_max: float = 0.0
    """Requests per second up to which is searched: what it cannot exceed with any seed."""
    goodput: Goodput | None = None
    """None: it was not simulated, because it cannot win."""
    refused: str = ""
    """Why it can never serve this workload."""

    @property
    def rate(self) -> float:
        """Requests per second within the limits."""
        return self.goodput.mean if self.goodput else 0.0

    @property
    def per_cost(self) -> float:
        """The same for a unit of cost."""
        return self.rate / self.cost


@dataclass
class Ranking:
    """The outcome of a search."""

    found: list[Found] = field(default_factory=list)
    """Best first; those that were not simulated last."""
    refused: list[Refused] = field(default_factory=list)

    def best(self, arrangement: str | None = None) -> Found | None:
        """The best one of an arrangement, or of all; None if nothing keeps the limits at any rate."""
        return next((one for one in self.found if one.rate and arrangement in (None, one.candidate.arrangement)), None)


def search(question: Question) -> Ranking:
    """Ranks what can be built. The best one is the same with and without pruning; so is the best of each arrangement.

    Raises:
        InvalidRequestError: there is nothing to look at, or nothing keeps the limits; the message says what stands
            against it.
    """
    q = question
    built, refused = candidates(q.profiles, q.fleet, q.prefill_settings, q.decode_settings, q.free_ms_to_try)
    if not built:
        raise InvalidRequestError(f"nothing can be built: {_reasons(refused)}", field="devices")
    loads = [drawn(q.traffic, seed, len(q.seeds), q.arrivals) for seed in q.seeds]
    looked = [_looked(candidate, q, loads) for candidate in built]
    ranking = Ranking(refused=refused)
    for arrangement in (TOGETHER, APART):
        mine = [one for one in looked if one.candidate.arrangement == arrangement]
        ranking.found += _simulated(sorted(mine, key=lambda one: _promise(one, q)), q)
    ranking.found.sort(key=lambda one: (one.goodput is None, *_rank(one, q)))
    if ranking.best() is None:
        raise InvalidRequestError(_obstacles(ranking), field="slo")
    return ranking


def _looked(candidate: Candidate, question: Question, loads: Sequence[Traffic]) -> Found:
    cost = question.fleet.cost(candidate.taken)
    try:
        refusal = candidate.cluster.refusal(question.traffic)
    except InvalidRequestError as error:
        refusal = error.message
    if refusal:
        return Found(candidate, cost, 0.0, refused=refusal)
    ceilings = [highest(candidate, question, load) for load in loads]
    return Found(candidate, cost, fmean(ceilings), max(ceilings))


def highest(candidate: Candidate, question: Question, load: Traffic) -> float:
    """Requests per second that a candidate cannot exceed, or up to which is searched if no bound is known."""
    most = ceiling(candidate, load, question.slo)
    return most if most < math.inf else question.rate_max * sum(candidate.taken.values())


def _simulated(looked: Sequence[Found], question: Question) -> list[Found]:
    found, best = [], None
    for one in looked:
        if not one.refused and not (question.prune and best is not None and _cannot_win(one, best, question)):
            value = goodput(
                one.candidate.cluster, question.traffic, question.slo, one.rate_max, question.seeds, question.arrivals
            )
            one = replace(one, goodput=value)  # noqa: PLW2901
            best = one if best is None else min(best, one, key=lambda each: _rank(each, question))
        found.append(one)
    return found


def _serves(one: Found, rate: float) -> bool:
    return one.rate >= rate


def _rank(one: Found, question: Question) -> tuple[float, ...]:
    """Sorts the best first. Where two are equal, the one of fewer devices, then the one that is simpler."""
    size = sum(one.candidate.taken.values())
    simple = (float(size), float(one.candidate.arrangement == APART), *map(float, one.candidate.shape))
    if question.rate is None:
        return (-one.per_cost, *simple)
    served = _serves(one, question.rate)
    return (float(not served), one.cost if served else -one.rate, -one.rate, *simple)


def _promise(one: Found, question: Question) -> tuple[float, ...]:
    """Sorts first what may be best."""
    if question.rate is None:
        return (-one.ceiling / one.cost, one.cost)
    may_serve = one.ceiling >= question.rate
    return (float(not may_serve), one.cost if may_serve else -one.ceiling)


def _cannot_win(one: Found, best: Found, question: Question) -> bool:
    if question.rate is None:
        return one.ceiling / one.cost < best.per_cost
    if one.ceiling < question.rate:
        return _serves(best, question.rate) or one.ceiling < best.rate
    return _serves(best, question.rate) and one.cost > best.cost


def _obstacles(ranking: Ranking) -> str:
    why = {one.refused or (one.goodput.why if one.goodput else "") for one in ranking.found} - {""}
    return f"nothing keeps the limits: {'; '.join(sorted(why)[:3])}"


def _reasons(refused: Sequence[Refused]) -> str:
    return "; ".join(f"{one.what} {one.why}" for one in refused[:3]) or "no profile fits another"
