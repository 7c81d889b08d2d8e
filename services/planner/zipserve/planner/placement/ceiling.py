"""What no simulation of a candidate can exceed: its workers have to compute at least so much, and have no more than the
time until the last request is late. Pure."""

import math
from dataclasses import dataclass

import numpy as np

from zipserve.planner.native.objectives import Objective, Slo
from zipserve.planner.native.pacing import CHUNK_TOKENS_MIN
from zipserve.planner.native.step_model import Floats
from zipserve.planner.native.traffic import Traffic
from zipserve.planner.native.workers import DecodeWorker, PrefillWorker
from zipserve.planner.placement.candidate import Candidate

_SLACK = 1 - 1e-9
"""Sums are added up in another order here than in the simulation."""


@dataclass(frozen=True)
class _Load:
    """What requests ask of workers, each [requests]."""

    tokens: Floats
    pairs: Floats
    rows: Floats
    contexts: Floats


def ceiling(candidate: Candidate, traffic: Traffic, slo: Slo) -> float:
    """Requests per second that a candidate cannot exceed with these gaps; infinite where nothing is known."""
    cluster, prompts, decodes = candidate.cluster, _prompts(traffic), _decodes(traffic)
    rates = [math.inf]
    for one in slo.objectives:
        if not isinstance(one, Objective) or one.of is not None:
            continue
        misses = one.misses_max(traffic)
        first_ms = min(one.ttft_ms, one.e2e_ms)
        last_ms = min(one.e2e_ms, one.ttft_ms + one.tpot_ms * float(traffic.outputs.max()))
        if cluster.prefills:
            work = _least_ms(cluster.prefills[0], prompts, misses)
            rates.append(_rate(work / len(cluster.prefills), first_ms, traffic))
            work = _least_ms(cluster.decodes[0], decodes, misses)
        else:
            both = _Load(prompts.tokens, prompts.pairs, decodes.rows, decodes.contexts)
            work = _least_ms(cluster.decodes[0], both, misses)
        rates.append(_rate(work / len(cluster.decodes), last_ms, traffic))
    return min(rates)


def _prompts(traffic: Traffic) -> _Load:
    tokens, before = (traffic.prompts - traffic.cached).astype(np.float64), traffic.cached.astype(np.float64)
    none = np.zeros(len(traffic))
    return _Load(tokens, tokens * before + tokens * (tokens + 1) / 2, none, none)


def _decodes(traffic: Traffic) -> _Load:
    rows, none = traffic.outputs.astype(np.float64), np.zeros(len(traffic))
    return _Load(none, none, rows, rows * traffic.prompts + rows * (rows - 1) / 2)


def _least_ms(worker: PrefillWorker | DecodeWorker, load: _Load, misses: int) -> float:
    """Of all requests but those that may be missed: every token and row at its cheapest, in as few steps as can be."""
    step, slots = worker.step, worker.slots
    # beside sequences that decode, a prompt has at least so much, whatever the setting says
    step_tokens = max(worker.step_tokens, CHUNK_TOKENS_MIN)
    own_ms = load.tokens * _cheapest(step.token_knots, step.token_slopes, step_tokens)
    own_ms += load.pairs * step.pair_ms + load.contexts * step.context_ms
    own_ms += load.rows * _cheapest(step.row_knots, step.row_slopes, slots)
    steps = max(_least(load.tokens, misses) / step_tokens, _least(load.rows, misses) / slots)
    return (_least(own_ms, misses) + steps * step.constant_ms) * _SLACK


def _least(values: Floats, misses: int) -> float:
    return float(np.sort(values)[: len(values) - misses].sum())


def _cheapest(knots: Floats, slopes: Floats, most: int) -> float:
    """The least that one of up to `most` things takes, in ms: somewhere on a curve that is straight between knots, at
    a knot or at an end."""
    places = np.array([1.0, *(knot for knot in knots if 1 < knot < most), float(most)])
    widths = np.diff(np.append(knots, np.inf))
    heights = [float(np.sum(slopes * np.clip(place - knots, 0.0, widths))) for place in places]
    return float(np.min(np.array(heights) / places))


def _rate(busy_ms: float, late_ms: float, traffic: Traffic) -> float:
    """Work that has to be over when the last request is late."""
    left_ms, gaps = busy_ms - late_ms, float(traffic.unit_gaps[1:].sum())
    return 1000.0 * gaps / left_ms if left_ms > 0 and gaps > 0 else math.inf
