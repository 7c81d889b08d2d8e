"""The router: whom it admits, and to which workers it sends them. Compiled.

What it knows of a worker is what it has sent there and not seen end, and is never late: as one router knows it.
Heartbeats, which tell each router of the others' work, are left out. So is which worker is likely to have a prompt's
blocks, or can fetch them: what is cached is a number of the request, wherever that is sent.
"""

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.state import State


@compiled
def try_admit(machines: Machines, state: State, request: int) -> bool:
    """Counts a request that has come, or refuses it when too many, or too many tokens, are in flight."""
    tokens = _tokens(state, request)
    counters, rules = state.counters, machines.rules
    if counters[c.REQUESTS] >= rules[c.REQUESTS_MAX] or counters[c.REQUEST_TOKENS] + tokens > rules[c.TOKENS_MAX]:
        return False
    counters[c.REQUESTS] += 1
    counters[c.REQUEST_TOKENS] += tokens
    return True


@compiled
def note_end(state: State, request: int) -> None:
    """A request has its last token."""
    state.counters[c.REQUESTS] -= 1
    state.counters[c.REQUEST_TOKENS] -= _tokens(state, request)
    state.stations[state.requests[request, c.DECODE], c.OUTSTANDING] -= 1


@compiled
def choose(machines: Machines, state: State, request: int) -> None:
    """Writes who computes the prompt and who decodes it: the prefill worker with the fewest tokens to compute, the
    decode worker with the fewest requests, then with the most free blocks; of equals whose last turn is longest ago.
    """
    requests, stations = state.requests, state.stations
    prompt, limit = requests[request, c.PROMPT], machines.rules[c.LOCAL_TOKENS_MAX]
    prefill = c.NONE
    if 0 <= limit < prompt:
        prefill = _best_prefill(machines, state)
    decode = _best_decode(machines, state, prefill)
    requests[request, c.PREFILL], requests[request, c.DECODE] = prefill, decode
    state.counters[c.PICKS] += 1
    stations[decode, c.OUTSTANDING] += 1
    stations[decode, c.PICKED] = state.counters[c.PICKS]
    if prefill != c.NONE:
        stations[prefill, c.OUTSTANDING] += prompt - requests[request, c.CACHED]
        stations[prefill, c.PICKED] = state.counters[c.PICKS]


@compiled
def _best_prefill(machines: Machines, state: State) -> int:
    best = 0
    for worker in range(1, len(machines.wires)):
        station, other = state.stations[worker], state.stations[best]
        if station[c.OUTSTANDING] < other[c.OUTSTANDING] or (
            station[c.OUTSTANDING] == other[c.OUTSTANDING] and station[c.PICKED] < other[c.PICKED]
        ):
            best = worker
    return best


@compiled
def _best_decode(machines: Machines, state: State, prefill: int) -> int:
    """Of those that read what the prefill worker writes."""
    best = c.NONE
    for worker in range(len(machines.wires), len(machines.sizes)):
        if prefill != c.NONE and machines.sizes[worker, c.LAYOUT] != machines.sizes[prefill, c.LAYOUT]:
            continue
        if best == c.NONE or _is_better(machines, state, worker, best):
            best = worker
    return best


@compiled
def _is_better(machines: Machines, state: State, worker: int, other: int) -> bool:
    mine, its = state.stations[worker], state.stations[other]
    if mine[c.OUTSTANDING] != its[c.OUTSTANDING]:
        return bool(mine[c.OUTSTANDING] < its[c.OUTSTANDING])
    free = machines.sizes[worker, c.BLOCKS] - mine[c.BLOCKS_USED]
    its_free = machines.sizes[other, c.BLOCKS] - its[c.BLOCKS_USED]
    if free != its_free:
        return bool(free > its_free)
    return bool(mine[c.PICKED] < its[c.PICKED])


@compiled
def _tokens(state: State, request: int) -> int:
    """Of a prompt and its answer."""
    return int(state.requests[request, c.PROMPT] + state.requests[request, c.OUTPUT] + 1)
