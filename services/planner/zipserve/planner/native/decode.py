"""A decode worker: its line, its batch, prompts in chunks beside it, and who makes room for whom. Compiled."""

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.lateness import Goal, note_gap
from zipserve.planner.native.links import post_pull
from zipserve.planner.native.lists import append, insert, remove
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.pacing import chunk_tokens, note_step
from zipserve.planner.native.residency import (
    free_spent_tails,
    grow,
    is_fresh,
    let_go,
    make_room,
    misses_block,
    try_hold,
)
from zipserve.planner.native.sharing import count_shares, left, share, shared
from zipserve.planner.native.state import State
from zipserve.planner.native.steps import begin_step, end_step, want_step


@compiled
def enter_line(machines: Machines, state: State, worker: int, request: int, now_ms: float) -> None:
    """A sequence comes, with its first token or with its prompt to be computed, and is admitted when there is room."""
    station, requests = state.stations[worker], state.requests
    station[c.ENTERED] += 1
    requests[request, c.NUMBER] = station[c.ENTERED]
    requests[request, c.TOKENS] = requests[request, c.PROMPT]
    append(state.stations, requests, worker, request)
    admit(machines, state, worker, now_ms)


@compiled
def admit(machines: Machines, state: State, worker: int, now_ms: float) -> None:
    """Admits from the line, whose first is never overtaken: those that were parked run again, the others are pulled, or
    their prompts computed."""
    requests = state.requests
    request = state.stations[worker, c.HEAD]
    while request != c.NONE and try_hold(machines, state, worker, request):
        remove(state.stations, requests, worker, request)
        if requests[request, c.PREFILL] == c.NONE and not requests[request, c.PARKED]:
            requests[request, c.COMPUTED] = requests[request, c.CACHED]
            requests[request, c.STARTED] = 1
        if requests[request, c.PREFILL] == c.NONE or requests[request, c.PARKED]:
            _run(machines, state, worker, request)
        else:
            post_pull(machines, state, request, now_ms)
        request = state.stations[worker, c.HEAD]


@compiled
def join_pulled(machines: Machines, state: State, worker: int, request: int) -> None:
    """A sequence has its KV, and joins the batch."""
    state.requests[request, c.TOKENS] += 1
    state.requests[request, c.LEFT] = state.requests[request, c.OUTPUT]
    state.stations[worker, c.FRESH_TAILS] += is_fresh(machines, state, worker, request)
    _run(machines, state, worker, request)


@compiled
def begin_decode(machines: Machines, state: State, worker: int, now_ms: float) -> None:
    """Begins a step of all that run, or rests: when nothing runs, or the only one waits for a block."""
    station, size = state.stations[worker], machines.sizes[worker]
    while True:
        while station[c.RUNNING] > 1 and station[c.MISSING] > size[c.BLOCKS] - station[c.BLOCKS_USED]:
            _park_youngest(machines, state, worker)
        running, prompts, context = station[c.RUNNING], station[c.PROMPTS], station[c.CONTEXT]
        if station[c.MISSING] > size[c.BLOCKS] - station[c.BLOCKS_USED]:
            return
        grow(machines, state, worker)
        admit(machines, state, worker, now_ms)  # who comes back now has its first step after this one
        if running:
            break
        if not station[c.RUNNING]:
            return
    rows, tokens, pairs = running - prompts, 0, 0.0
    if prompts:
        rates = machines.rates[worker]
        offered = chunk_tokens(state.paces[worker], rows, size[c.STEP_TOKENS], rates[c.SLOWDOWN], rates[c.FREE_MS])
        share(machines, state, worker, _prompts_by_rank(state, worker, running), offered, False)
        tokens, pairs = shared(state, worker)
    station[c.STEPPING], station[c.STEP_ROWS], station[c.STEP_PROMPT_TOKENS] = running, rows, tokens
    station[c.SPENT_TAILS] = station[c.FRESH_TAILS]
    begin_step(machines, state, worker, now_ms, tokens, pairs, rows, context)


@compiled
def end_decode(machines: Machines, state: State, goal: Goal, worker: int, now_ms: float) -> tuple[int, int]:
    """Ends a step: everybody that decodes has a token more.

    Returns:
        How many prompts have their first token, which come first in `state.chunks`, and how many sequences have their
        last one, which stand behind the running ones in `state.rows`.
    """
    station = state.stations[worker]
    end_step(state, worker)
    free_spent_tails(state, worker)
    note_step(state.paces[worker], station[c.STEP_ROWS], station[c.STEP_PROMPT_TOKENS], state.clocks[worker, c.STEP_MS])
    done = _count_tokens(machines, state, goal, worker, now_ms)
    started = count_shares(state, worker)
    for i in range(started):
        request = state.chunks[worker, i]
        state.requests[request, c.TOKENS] += 1
        state.requests[request, c.LEFT] = state.requests[request, c.OUTPUT]
        station[c.PROMPTS] -= 1
        station[c.CONTEXT] += state.requests[request, c.TOKENS]
        station[c.MISSING] += misses_block(machines, state, worker, request)
    return started, done


@compiled
def _count_tokens(machines: Machines, state: State, goal: Goal, worker: int, now_ms: float) -> int:
    """Notes a gap for each sequence that decodes; those that are complete change places with the last running ones."""
    station, requests, times, rows = state.stations[worker], state.requests, state.times, state.rows
    block_tokens = machines.sizes[worker, c.BLOCK_TOKENS]
    done, missing = 0, 0
    for row in range(station[c.STEPPING] - 1, -1, -1):
        request = rows[worker, row]
        if requests[request, c.COMPUTED] < requests[request, c.PROMPT]:
            continue
        gap_ms = now_ms - times[request, c.LAST]
        times[request, c.LAST] = now_ms
        state.gaps_ms[requests[request, c.GAPS_END]] = gap_ms
        requests[request, c.GAPS_END] += 1
        if gap_ms > times[request, c.GAP_MAX]:
            note_gap(goal, state, request, gap_ms)
        requests[request, c.TOKENS] += 1
        requests[request, c.LEFT] -= 1
        if requests[request, c.LEFT]:
            missing += requests[request, c.TOKENS] == (requests[request, c.HELD] + 1) * block_tokens
        else:
            station[c.CONTEXT] -= requests[request, c.TOKENS]
            _leave_row(state, worker, row)
            let_go(machines, state, worker, request)
            done += 1
    station[c.CONTEXT] += station[c.STEP_ROWS]
    station[c.MISSING] += missing
    return done


@compiled
def _run(machines: Machines, state: State, worker: int, request: int) -> None:
    """A sequence is in the batch from its next step on."""
    station = state.stations[worker]
    state.rows[worker, station[c.RUNNING]] = request
    station[c.RUNNING] += 1
    if left(state, request):
        station[c.PROMPTS] += 1
    else:
        station[c.CONTEXT] += state.requests[request, c.TOKENS]
        station[c.MISSING] += misses_block(machines, state, worker, request)
    want_step(state, worker)


@compiled
def _leave_row(state: State, worker: int, row: int) -> None:
    """The last row takes the place of one that is given up."""
    station, rows = state.stations[worker], state.rows
    station[c.RUNNING] -= 1
    last = station[c.RUNNING]
    rows[worker, row], rows[worker, last] = rows[worker, last], rows[worker, row]


@compiled
def _park_youngest(machines: Machines, state: State, worker: int) -> None:
    """The last in rank makes room, and stands in the line before those that never ran, by rank."""
    station, requests = state.stations[worker], state.requests
    youngest = 0
    for row in range(1, station[c.RUNNING]):
        if requests[state.rows[worker, row], c.NUMBER] > requests[state.rows[worker, youngest], c.NUMBER]:
            youngest = row
    request = state.rows[worker, youngest]
    if left(state, request):
        station[c.PROMPTS] -= 1
    else:
        station[c.CONTEXT] -= requests[request, c.TOKENS]
    _leave_row(state, worker, youngest)
    make_room(machines, state, worker, request)
    requests[request, c.PARKED] = 1
    station[c.PARKINGS] += 1
    after = station[c.HEAD]
    while after != c.NONE and requests[after, c.NUMBER] < requests[request, c.NUMBER]:
        after = requests[after, c.AFTER]
    insert(state.stations, requests, worker, request, after)


@compiled
def _prompts_by_rank(state: State, worker: int, running: int) -> int:
    """Lays out the running sequences whose prompts are not complete, by rank; returns how many they are."""
    requests, order = state.requests, state.order
    count = 0
    for row in range(running):
        request = state.rows[worker, row]
        if not left(state, request):
            continue
        place = count
        while place and requests[order[place - 1], c.NUMBER] > requests[request, c.NUMBER]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = request
        count += 1
    return count
