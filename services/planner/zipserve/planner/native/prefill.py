"""A prefill worker: its queue, and steps of as many tokens as it may compute at once. Compiled."""

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.lists import append, remove
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.residency import leave_slot, try_start
from zipserve.planner.native.sharing import count_shares, share, shared
from zipserve.planner.native.state import State
from zipserve.planner.native.steps import begin_step, end_step


@compiled
def enter_queue(state: State, worker: int, request: int) -> None:
    """A prompt comes."""
    append(state.stations, state.requests, worker, request)
    state.stations[worker, c.ENTERED] += 1


@compiled
def begin_prefill(machines: Machines, state: State, worker: int, now_ms: float) -> None:
    """Begins a step of what has come, or rests. When the first in line has no slabs, nobody else starts either."""
    count = _by_rank(state, worker)
    if not count:
        return
    first = state.order[0]
    may_start = bool(state.requests[first, c.STARTED]) or try_start(machines, state, worker, first)
    share(machines, state, worker, count, machines.sizes[worker, c.STEP_TOKENS], may_start)
    tokens, pairs = shared(state, worker)
    if tokens:
        begin_step(machines, state, worker, now_ms, tokens, pairs, 0, 0)


@compiled
def end_prefill(state: State, worker: int) -> int:
    """Ends a step. Those whose prompt is complete come first in `state.chunks`; returns how many they are."""
    requests = state.requests
    end_step(state, worker)
    complete = int(count_shares(state, worker))
    for i in range(complete):
        request = state.chunks[worker, i]
        remove(state.stations, requests, worker, request)
        leave_slot(state, worker)
        state.stations[worker, c.OUTSTANDING] -= requests[request, c.PROMPT] - requests[request, c.CACHED]
    return complete


@compiled
def _by_rank(state: State, worker: int) -> int:
    """Lays out the prompts of a worker in the order in which they came; returns how many they are."""
    count = 0
    request = state.stations[worker, c.HEAD]
    while request != c.NONE:
        state.order[count] = request
        count += 1
        request = state.requests[request, c.AFTER]
    return count
