"""What changes while a cluster is simulated: few arrays, all of them taken before the run begins. Pure."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zipserve.planner.native import columns as c
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.pacing import fresh_paces
from zipserve.planner.native.traffic import Traffic

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class State(NamedTuple):
    """Columns are named in `columns`."""

    requests: Ints
    """[requests, columns]."""
    times: Floats
    """[requests, columns]."""
    stations: Ints
    """[stations, columns]."""
    clocks: Floats
    """[stations, columns]."""
    ends_ms: Floats
    """[stations]: when what each is doing ends; infinite while it rests."""
    rows: Ints
    """[workers, slots]: requests that run on a decode worker."""
    chunks: Ints
    """[workers, slots]: requests whose prompts have a share in the step that runs."""
    order: Ints
    """[requests]: prompts by rank, while a step is shared out."""
    paces: Floats
    """[workers, columns]: what a decode worker has learned of its steps."""
    gaps_ms: Floats
    """[tokens]: before each token of each request but the first, request by request."""
    late: Ints
    """[objectives]: requests, or gaps, that do not keep it."""
    counters: Ints


def fresh_state(
    machines: Machines, traffic: Traffic, arrivals_ms: Floats, gap_max_ms: Floats, objectives: int
) -> State:
    """Before the first request has come.

    Args:
        gap_max_ms: of each request: gaps beyond are told to its objectives.
    """
    count, workers = len(traffic), len(machines.sizes)
    stations, slots = workers + len(machines.links), int(machines.sizes[:, c.SLOTS].max())
    state = State(
        requests=np.zeros((count, c.REQUEST_COLUMNS), np.int64),
        times=np.full((count, c.TIME_COLUMNS), np.inf),
        stations=np.zeros((stations, c.STATION_COLUMNS), np.int64),
        clocks=np.zeros((stations, c.CLOCK_COLUMNS)),
        ends_ms=np.full(stations, np.inf),
        rows=np.zeros((workers, slots), np.int64),
        chunks=np.zeros((workers, slots), np.int64),
        order=np.zeros(count, np.int64),
        paces=fresh_paces(workers),
        gaps_ms=np.empty(int(traffic.outputs.sum())),
        late=np.zeros(objectives, np.int64),
        counters=np.zeros(c.COUNTERS, np.int64),
    )
    requests, ends = state.requests, np.cumsum(traffic.outputs)
    requests[:, c.PROMPT], requests[:, c.OUTPUT] = traffic.prompts, traffic.outputs
    requests[:, c.CACHED], requests[:, c.FOUND], requests[:, c.CLASS] = traffic.cached, traffic.found, traffic.classes
    requests[:, c.GAPS_END] = ends - traffic.outputs
    state.times[:, c.ARRIVED], state.times[:, c.GAP_MAX] = arrivals_ms, gap_max_ms
    state.stations[:, [c.HEAD, c.TAIL]] = c.NONE
    return state
