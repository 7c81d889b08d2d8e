"""Steps of a worker, of either role: when they end. Compiled."""

import numpy as np

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.state import State


@compiled
def begin_step(
    machines: Machines,
    state: State,
    worker: int,
    now_ms: float,
    prompt_tokens: int,
    pairs: float,
    rows: int,
    context_tokens: int,
) -> None:
    """Begins a step that holds so much; see `step_model.step_ms`."""
    rates = machines.rates[worker]
    took_ms = machines.tokens_ms[worker, prompt_tokens] + rates[c.PAIR_MS] * pairs
    took_ms = took_ms + machines.rows_ms[worker, rows] + rates[c.CONTEXT_MS] * context_tokens
    state.stations[worker, c.STEPS] += 1
    state.clocks[worker, c.STEP_MS] = took_ms
    state.ends_ms[worker] = now_ms + took_ms


@compiled
def end_step(state: State, worker: int) -> None:
    """The worker rests, until it begins another step."""
    state.clocks[worker, c.BUSY] += state.clocks[worker, c.STEP_MS]
    state.ends_ms[worker] = np.inf


@compiled
def want_step(state: State, worker: int) -> None:
    """Something has come, or room was made: a worker that rests is to look for a step at this instant."""
    if state.ends_ms[worker] == np.inf and not state.stations[worker, c.DIRTY]:
        state.stations[worker, c.DIRTY] = 1
        state.counters[c.DIRTY_STATIONS] += 1
