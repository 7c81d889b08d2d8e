"""The run of a whole cluster, event by event: the clock jumps to whatever ends or comes next. Compiled.

Nothing is sampled or cut into time steps, so that a run is exact in double precision, and the same every time. At one
instant all that comes and ends is booked first: arrivals, then by the order of the stations. Then workers that rest
begin their next steps, so that what comes together is computed together.

The code that numba keeps on disk is found by the file of the compiled function alone, while here most of it comes from
other modules. So only the whole is kept, under a key with the digest of all of them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import OPTIONS, compiled
from zipserve.planner.native.decode import admit, begin_decode, end_decode, enter_line, join_pulled
from zipserve.planner.native.lateness import Goal, note_overdue, note_refused, note_time
from zipserve.planner.native.links import end_pull
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.prefill import begin_prefill, end_prefill, enter_queue
from zipserve.planner.native.residency import release_prompt
from zipserve.planner.native.routing import choose, note_end, try_admit
from zipserve.planner.native.state import State
from zipserve.planner.native.steps import want_step


@compiled
def _arrive(machines: Machines, state: State, goal: Goal, request: int, now_ms: float) -> None:
    """A request comes."""
    if not try_admit(machines, state, request):
        note_refused(goal, state, request)
        return
    choose(machines, state, request)
    prefill, decode = state.requests[request, c.PREFILL], state.requests[request, c.DECODE]
    if prefill == c.NONE:
        enter_line(machines, state, decode, request, now_ms)
    else:
        enter_queue(state, prefill, request)
        want_step(state, prefill)


@compiled
def _tell_first(machines: Machines, state: State, goal: Goal, worker: int, request: int, now_ms: float) -> None:
    """The first token goes to the client."""
    times = state.times
    times[request, c.FIRST] = times[request, c.LAST] = now_ms
    ttft_ms = now_ms - times[request, c.ARRIVED] + machines.rates[worker, c.OVERHEAD_MS]
    note_time(goal, state, request, c.TTFT, ttft_ms)


@compiled
def _tell_last(machines: Machines, state: State, goal: Goal, request: int, now_ms: float) -> None:
    """The last token goes to the client."""
    requests, times = state.requests, state.times
    times[request, c.DONE] = now_ms
    prefill = requests[request, c.PREFILL]
    first_at = requests[request, c.DECODE] if prefill == c.NONE else prefill
    e2e_ms = now_ms - times[request, c.ARRIVED] + machines.rates[first_at, c.OVERHEAD_MS]
    note_time(goal, state, request, c.TPOT, (now_ms - times[request, c.FIRST]) / requests[request, c.OUTPUT])
    note_time(goal, state, request, c.E2E, e2e_ms)
    note_end(state, request)


@compiled
def _end(machines: Machines, state: State, goal: Goal, station: int, now_ms: float) -> None:
    """What a station is doing ends."""
    if station < len(machines.wires):
        for i in range(end_prefill(state, station)):
            request = state.chunks[station, i]
            _tell_first(machines, state, goal, station, request, now_ms)
            enter_line(machines, state, state.requests[request, c.DECODE], request, now_ms)
        want_step(state, station)
    elif station < len(machines.sizes):
        started, done = end_decode(machines, state, goal, station, now_ms)
        for i in range(started):
            _tell_first(machines, state, goal, station, state.chunks[station, i], now_ms)
        running = state.stations[station, c.RUNNING]
        for row in range(running, running + done):
            _tell_last(machines, state, goal, state.rows[station, row], now_ms)
        admit(machines, state, station, now_ms)
        want_step(state, station)
    else:
        request = end_pull(state, station)
        release_prompt(machines, state, request)
        want_step(state, state.requests[request, c.PREFILL])
        join_pulled(machines, state, state.requests[request, c.DECODE], request)


@compiled
def _begin_steps(machines: Machines, state: State, now_ms: float) -> None:
    """All that is booked at this instant is known to the workers that rest."""
    state.counters[c.DIRTY_STATIONS] = 0
    for worker in range(len(machines.sizes)):
        wants = state.stations[worker, c.DIRTY]
        state.stations[worker, c.DIRTY] = 0
        if not wants or state.ends_ms[worker] < np.inf:
            continue
        if worker < len(machines.wires):
            begin_prefill(machines, state, worker, now_ms)
        else:
            begin_decode(machines, state, worker, now_ms)


def _digest() -> str:
    """Of the sources of this folder."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _compiled(sources: str) -> Callable[[Machines, State, Goal], bool]:
    @njit(cache=True, **OPTIONS)
    def run(machines: Machines, state: State, goal: Goal) -> bool:
        """Simulates all requests, in `state`, which has to be fresh; False if an objective was missed and the run was
        given up."""
        if not sources:  # numba's key holds what a function encloses
            return False
        arrivals_ms, ends_ms, counters = state.times[:, c.ARRIVED], state.ends_ms, state.counters
        now_ms = 0.0
        while not counters[c.IS_LOST]:
            station = np.argmin(ends_ms)
            arrived = counters[c.ARRIVALS]
            arrives_ms = arrivals_ms[arrived] if arrived < len(arrivals_ms) else np.inf
            next_ms = min(arrives_ms, ends_ms[station])
            if next_ms > now_ms and counters[c.DIRTY_STATIONS]:
                _begin_steps(machines, state, now_ms)
                continue
            if next_ms == np.inf:
                return True
            now_ms = next_ms
            note_overdue(goal, state, now_ms)
            if arrives_ms == now_ms:
                counters[c.ARRIVALS] += 1
                _arrive(machines, state, goal, arrived, now_ms)
            else:
                _end(machines, state, goal, station, now_ms)
        return False

    return run  # type: ignore[no-any-return]  # numba's decorators have no types


run = _compiled(_digest())
