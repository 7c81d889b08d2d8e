"""Lists of requests at stations, linked through the requests: each stands in one at most. Compiled."""

import numpy as np
from numpy.typing import NDArray

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled

Ints = NDArray[np.int64]


@compiled
def append(stations: Ints, requests: Ints, station: int, request: int) -> None:
    """Puts a request at the end."""
    insert(stations, requests, station, request, c.NONE)


@compiled
def insert(stations: Ints, requests: Ints, station: int, request: int, after: int) -> None:
    """Puts a request before another one of the list, or at the end."""
    before = stations[station, c.TAIL] if after == c.NONE else requests[after, c.BEFORE]
    _join(stations, requests, station, before, request)
    _join(stations, requests, station, request, after)


@compiled
def remove(stations: Ints, requests: Ints, station: int, request: int) -> None:
    """Takes a request out."""
    _join(stations, requests, station, requests[request, c.BEFORE], requests[request, c.AFTER])


@compiled
def _join(stations: Ints, requests: Ints, station: int, before: int, after: int) -> None:
    """Makes two requests neighbours; NONE is the list's end on that side."""
    if before == c.NONE:
        stations[station, c.HEAD] = after
    else:
        requests[before, c.AFTER] = after
    if after == c.NONE:
        stations[station, c.TAIL] = before
    else:
        requests[after, c.BEFORE] = before
