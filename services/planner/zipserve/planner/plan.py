"""The whole question and the whole answer: what is served, on what, and which deployment serves most of it. Pure."""

import math
from dataclasses import dataclass, replace

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.goal import Slo
from zipserve.planner.latency import ModelProfile
from zipserve.planner.search import Deployment, Ranking, copies, copies_apart, rank, unreachable
from zipserve.planner.simulation import simulate_copies
from zipserve.planner.space import Devices, colocated, paired, pairs, phase
from zipserve.planner.workload import Workload

SEARCHES = {
    "pairs": "one prefill and one decode instance anywhere, simulated together",
    "paired": "Algorithm 2: KV never leaves a node, instances are cut into segments, one of each phase on a node",
    "apart": "Algorithm 1: the best instance of each phase by itself, as many of each as the rate needs",
}
COLOCATED = "colocated"
_SPACES = {"pairs": pairs, "paired": paired, COLOCATED: colocated}


@dataclass(frozen=True, eq=False)
class Question:
    """What is planned for."""

    model: ModelProfile
    devices: Devices
    workload: Workload
    slo: Slo
    search: str
    rate_max: float
    """Requests per second and device up to which is searched."""
    rate: float | None = None
    """Requests per second to serve; None: one copy of what is best per device."""
    prune: bool = True


@dataclass
class Plan:
    """What was found."""

    deployments: dict[str, Deployment]
    """By arrangement, the search's name or `colocated`: the best one of each that keeps the objectives."""
    refused: dict[str, InvalidRequestError]
    """By arrangement: why it has none."""
    rankings: dict[str, Ranking]
    """By name of the space that was searched."""

    @property
    def best(self) -> tuple[str, Deployment]:
        """The arrangement with the most goodput per device; where two are equal the colocated one, which is simpler."""
        return max(self.deployments.items(), key=lambda item: (item[1].goodput, item[0] == COLOCATED))


def make_plan(question: Question) -> Plan:
    """Searches deployments with phases apart and together.

    Raises:
        InvalidRequestError: neither keeps the objectives on these devices; the message says what stands against it.
    """
    plan = Plan({}, {}, {})
    for name in (question.search, COLOCATED):
        try:
            plan.deployments[name] = _apart(question, plan) if name == "apart" else _one_space(name, question, plan)
        except InvalidRequestError as error:
            plan.refused[name] = error
    if not plan.deployments:
        raise plan.refused[question.search]
    return plan


def _one_space(name: str, question: Question, plan: Plan) -> Deployment:
    q = question
    space = _SPACES[name](q.model, q.devices, q.workload)
    ranking = plan.rankings[name] = rank(space, q.workload, q.slo, q.rate_max, prune=q.prune)
    if ranking.best is None:
        raise unreachable(ranking, q.slo)
    return copies(ranking.best, q.devices, q.rate)


def _apart(question: Question, plan: Plan) -> Deployment:
    q = question
    for role, slo in (("prefill", replace(q.slo, tpot_ms=math.inf)), ("decode", replace(q.slo, ttft_ms=math.inf))):
        space = phase(q.model, q.devices, q.workload, prefill=role == "prefill")
        # which instances go together depends on how many fit, so that none of them is left out
        ranking = plan.rankings[role] = rank(space, q.workload, slo, q.rate_max, prune=q.prune and q.rate is not None)
        if ranking.best is None:
            raise unreachable(ranking, slo)
    found = copies_apart(plan.rankings["prefill"], plan.rankings["decode"], q.devices, q.rate)
    (prefills, first), (decodes, second) = found.parts
    assert first.prefill is not None
    assert second.decode is not None
    rate = found.rate if q.rate is None else q.rate
    together = simulate_copies(first.prefill, prefills, second.decode, decodes, q.workload, rate)
    return replace(found, attained=q.slo.attained(together.ttft_ms, together.tpot_ms))
