"""Pulls: a link reads one after another, in the order in which they are posted. Compiled.

So does a worker's NIXL thread over UCX: two reads that are posted at once, of one peer or of two, end after one and two
times as long as one alone, and a small one behind a large one waits for it.
"""

import numpy as np

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.lists import append, remove
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.residency import has_tail
from zipserve.planner.native.state import State


@compiled
def post_pull(machines: Machines, state: State, request: int, now_ms: float) -> None:
    """Posts the read of a prompt's blocks and tail, of which its decode worker has none but those that it has found."""
    requests = state.requests
    source, reader = requests[request, c.PREFILL], requests[request, c.DECODE]
    link = machines.wires[source, reader - len(machines.wires)]
    station, size = len(machines.sizes) + link, machines.sizes[source]
    prompt, block_tokens = requests[request, c.PROMPT], size[c.BLOCK_TOKENS]
    blocks = prompt // block_tokens - requests[request, c.FOUND]
    tail = has_tail(prompt, block_tokens)
    read_ms = (blocks * size[c.BLOCK_BYTES] + tail * size[c.TAIL_BYTES]) / machines.links[link, c.BYTES_PER_MS]
    begin_ms = max(now_ms + machines.links[link, c.FIXED_MS], state.clocks[station, c.FREE])
    state.clocks[station, c.FREE] = begin_ms + read_ms
    state.clocks[station, c.BUSY] += read_ms
    state.times[request, c.PULLED] = begin_ms + read_ms
    if state.stations[station, c.HEAD] == c.NONE:
        state.ends_ms[station] = begin_ms + read_ms
    append(state.stations, requests, station, request)


@compiled
def end_pull(state: State, station: int) -> int:
    """Takes the pull off its link that has ended; returns its request."""
    request = state.stations[station, c.HEAD]
    remove(state.stations, state.requests, station, request)
    following = state.stations[station, c.HEAD]
    state.ends_ms[station] = np.inf if following == c.NONE else state.times[following, c.PULLED]
    return int(request)
