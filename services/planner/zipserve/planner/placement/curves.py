"""How many requests keep their limits, by rate: the curves of DistServe's figures 8 and 9. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zipserve.planner.native.goodput import drawn
from zipserve.planner.native.simulation import simulate
from zipserve.planner.native.step_model import Floats
from zipserve.planner.placement.candidate import Candidate
from zipserve.planner.placement.search import Question

POINTS = 12


@dataclass(frozen=True, eq=False)
class Curve:
    """Of one candidate."""

    candidate: Candidate
    rates: Floats
    """Requests per second."""
    attained: Floats
    """[objectives, rates]: the share that keeps each objective, over the seeds."""


def curve(candidate: Candidate, question: Question, rates: Sequence[float]) -> Curve:
    """What each objective attains at these rates."""
    loads = [drawn(question.traffic, seed, len(question.seeds), question.arrivals) for seed in question.seeds]
    objectives = question.slo.objectives
    attained = np.zeros((len(objectives), len(rates)))
    for column, rate in enumerate(rates):
        outcomes = [simulate(candidate.cluster, load, rate) for load in loads]
        for row, objective in enumerate(objectives):
            attained[row, column] = np.mean([objective.attained(outcome) for outcome in outcomes])
    return Curve(candidate, np.asarray(rates, np.float64), attained)


def rates_about(goodputs: Sequence[float]) -> list[float]:
    """Rates that show where curves fall: evenly spread to half as much again as the highest goodput."""
    return [float(rate) for rate in np.linspace(0.0, 1.5 * max(goodputs), POINTS + 1)[1:]]
