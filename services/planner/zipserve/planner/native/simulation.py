"""Simulates our own cluster: what each request of a workload would see of it at some rate. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native import columns as c
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.events import run
from zipserve.planner.native.lateness import NO_GOAL, Goal
from zipserve.planner.native.state import Floats, Ints, State, fresh_state
from zipserve.planner.native.traffic import Traffic, extras
from zipserve.planner.workload import Workload


@dataclass(frozen=True)
class Use:
    """How a station was used over a run."""

    busy: float
    """Share of the time from the first arrival to the last token in which it computed, or read."""
    slots_peak: int = 0
    blocks_peak: int = 0
    tails_peak: int = 0
    steps: int = 0
    parkings: int = 0
    """How often a sequence had to make room."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What each request saw, in ms. A request that the router refused has infinite times and no gaps; so have those
    that were not over when a run was given up."""

    traffic: Traffic
    ttft_ms: Floats
    """From its arrival at the router to its first token."""
    tpot_ms: Floats
    """Mean time per token after the first."""
    e2e_ms: Floats
    """From its arrival to its last token."""
    prefills: Sequence[Use]
    decodes: Sequence[Use]
    links: Sequence[Use]
    all_gaps_ms: Floats
    """Before each token but the first, request by request; of requests without times they mean nothing."""

    @property
    def served(self) -> NDArray[np.bool_]:
        """Which requests have times."""
        return np.isfinite(self.e2e_ms)

    @cached_property
    def gap_max_ms(self) -> Floats:
        """The largest gap of each request."""
        outputs = self.traffic.outputs
        largest: Floats = np.maximum.reduceat(self.all_gaps_ms, np.cumsum(outputs) - outputs)
        largest[~self.served] = np.inf
        return largest

    def gaps_ms(self, of: int | None = None) -> Floats:
        """All gaps of the requests that were served, of one class or of all."""
        wanted = self.served if of is None else self.served & (self.traffic.classes == of)
        gaps: Floats = self.all_gaps_ms[np.repeat(wanted, self.traffic.outputs)]
        return gaps

    def gap_quantiles_ms(self, shares: ArrayLike, of: int | None = None) -> Floats:
        """Quantiles of those, exact: of all gaps, none is binned. NaN where there are none."""
        gaps = self.gaps_ms(of)
        wanted = np.asarray(shares, np.float64)
        return np.quantile(gaps, wanted) if len(gaps) else np.full(wanted.shape, np.nan)


def simulate(cluster: Cluster, workload: Workload, rate: float) -> Outcome:
    """All times of a workload at `rate` requests per second.

    Raises:
        InvalidRequestError: the rate is no rate, or a request can never be served.
    """
    return attempt(cluster, workload, rate, NO_GOAL)[0]


def attempt(cluster: Cluster, workload: Workload, rate: float, goal: Goal) -> tuple[Outcome, bool]:
    """As `simulate`, but gives up, and says False, as soon as the goal can not be reached.

    Raises:
        InvalidRequestError: see `simulate`.
    """
    state, complete = play(cluster, workload, rate, goal)
    return _outcome(cluster, extras(workload), state), complete


def play(cluster: Cluster, workload: Workload, rate: float, goal: Goal) -> tuple[State, bool]:
    """The bare run, without what is made of it; see `attempt`."""
    if not (rate > 0 and np.isfinite(rate)):
        raise InvalidRequestError(f"a rate of {rate:g} requests per second is none", field="rate")
    if why := cluster.refusal(workload):
        raise InvalidRequestError(why, field="trace")
    traffic = extras(workload)
    state = fresh_state(
        cluster.machines, traffic, traffic.arrivals_ms(rate), _gap_max_ms(goal, traffic.classes), len(goal.classes)
    )
    return state, run(cluster.machines, state, goal)


def _gap_max_ms(goal: Goal, classes: Ints) -> Floats:
    """Of each request: the largest gap that no objective minds."""
    limits = np.full(len(classes), np.inf)
    for of, bounds in zip(goal.classes, goal.limits_ms, strict=True):
        mine = np.ones(len(classes), np.bool_) if of == c.NONE else classes == of
        limits[mine] = np.minimum(limits[mine], min(bounds[c.GAP], bounds[c.EVERY_GAP]))
    return limits


def _outcome(cluster: Cluster, traffic: Traffic, state: State) -> Outcome:
    times, requests = state.times, state.requests
    local = requests[:, c.PREFILL] == c.NONE
    overhead_ms = cluster.machines.rates[np.where(local, requests[:, c.DECODE], requests[:, c.PREFILL]), c.OVERHEAD_MS]
    arrived_ms, first_ms, done_ms = times[:, c.ARRIVED], times[:, c.FIRST], times[:, c.DONE]
    with np.errstate(invalid="ignore"):  # of those that have no times
        tpot_ms = (done_ms - first_ms) / traffic.outputs
    served = done_ms[np.isfinite(done_ms)]
    span_ms = float(served.max() - arrived_ms[0]) if len(served) else 0.0
    uses = [
        Use(
            float(clock[c.BUSY] / span_ms) if span_ms else 0.0,
            *(int(station[column]) for column in (c.SLOTS_PEAK, c.BLOCKS_PEAK, c.TAILS_PEAK, c.STEPS, c.PARKINGS)),
        )
        for station, clock in zip(state.stations, state.clocks, strict=True)
    ]
    prefills, workers = len(cluster.prefills), len(cluster.prefills) + len(cluster.decodes)
    return Outcome(
        traffic,
        first_ms - arrived_ms + overhead_ms,
        np.where(np.isfinite(done_ms), tpot_ms, np.inf),
        done_ms - arrived_ms + overhead_ms,
        uses[:prefills],
        uses[prefills:workers],
        uses[workers:],
        state.gaps_ms,
    )
