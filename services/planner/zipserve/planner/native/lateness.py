"""What is late, and when so much is that a run need not go on. Compiled."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.state import State

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Goal(NamedTuple):
    """Objectives, each for a class of requests or for all."""

    limits_ms: Floats
    """[objectives, 5]: on TTFT, TPOT, largest gap, end to end time, and any gap by itself; inclusive."""
    classes: Ints
    """Class of each; -1: all."""
    misses_max: Ints
    """Requests that may be late, or gaps where each counts by itself; one more, and the run is given up."""
    overdue_ms: float
    """Who has waited longer for a first token has missed all limits on it; infinite: there are none."""


def goal_of(limits_ms: Floats, classes: Ints, misses_max: Ints) -> Goal:
    """A goal of these objectives; with none, a run always goes on to its end."""
    first = limits_ms[:, c.TTFT]
    return Goal(limits_ms, classes, misses_max, float(first[np.isfinite(first)].max(initial=0.0) or np.inf))


NO_GOAL = goal_of(np.zeros((0, 5)), np.zeros(0, np.int64), np.zeros(0, np.int64))


@compiled
def note_time(goal: Goal, state: State, request: int, what: int, value_ms: float) -> None:
    """A time of a request is known: TTFT, TPOT, its largest gap so far, or end to end."""
    requests = state.requests
    for q in range(len(goal.classes)):
        mask = 1 << q
        if value_ms <= goal.limits_ms[q, what] or requests[request, c.LATE] & mask:
            continue
        if goal.classes[q] == c.NONE or goal.classes[q] == requests[request, c.CLASS]:
            requests[request, c.LATE] |= mask
            _count(goal, state, q)


@compiled
def note_gap(goal: Goal, state: State, request: int, gap_ms: float) -> None:
    """A gap is longer than some objective allows."""
    note_time(goal, state, request, c.GAP, gap_ms)
    for q in range(len(goal.classes)):
        applies = goal.classes[q] == c.NONE or goal.classes[q] == state.requests[request, c.CLASS]
        if applies and gap_ms > goal.limits_ms[q, c.EVERY_GAP]:
            _count(goal, state, q)


@compiled
def note_overdue(goal: Goal, state: State, now_ms: float) -> None:
    """Requests whose first token will be late whenever it comes are so already: where queues only grow, the run ends
    long before they are served."""
    times, counters = state.times, state.counters
    while counters[c.LOOKED_AT] < counters[c.ARRIVALS]:
        request = counters[c.LOOKED_AT]
        waited_ms = now_ms - times[request, c.ARRIVED]
        if waited_ms <= goal.overdue_ms:
            break
        if times[request, c.FIRST] == np.inf:
            note_time(goal, state, request, c.TTFT, waited_ms)
        counters[c.LOOKED_AT] += 1


@compiled
def note_refused(goal: Goal, state: State, request: int) -> None:
    """A request that never has a token is late in everything, with all the gaps that it would have had."""
    for what in range(c.EVERY_GAP):
        note_time(goal, state, request, what, np.inf)
    for _ in range(state.requests[request, c.OUTPUT]):
        note_gap(goal, state, request, np.inf)


@compiled
def _count(goal: Goal, state: State, objective: int) -> None:
    state.late[objective] += 1
    if state.late[objective] > goal.misses_max[objective]:
        state.counters[c.IS_LOST] = 1
