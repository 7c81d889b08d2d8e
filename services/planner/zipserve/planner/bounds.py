"""What no simulation can beat: floors under the times of requests, and so a ceiling over the goodput of a placement.

Each floor leaves out something that the simulation charges, never adds anything, and never falls when the rate rises.
So a rate that fails here fails in the simulation too, as does any above it; and this at any number of requests, also
where a trace ends before its queues have settled.
"""

import numpy as np

from zipserve.planner.chain import Floats
from zipserve.planner.goal import Slo
from zipserve.planner.goodput import highest_rate
from zipserve.planner.simulation import Placement
from zipserve.planner.workload import Workload

_SLACK = 1 - 1e-9
"""Sums are added up in another order here than in the simulation."""


def ceiling(placement: Placement, workload: Workload, slo: Slo, rate_max: float) -> float:
    """Requests per second and device which the goodput of a placement cannot exceed."""
    tpot_ms = tpot_floor_ms(placement, workload)
    work_ms = _decode_work_ms(placement, workload)
    return highest_rate(
        lambda rate: _may_pass(placement, workload, rate * placement.devices, slo, tpot_ms, work_ms), rate_max
    )


def ttft_floor_ms(placement: Placement, workload: Workload, rate: float) -> Floats:
    """Under the first token of each request: prompts are served in order, at least by their own work each."""
    instance = placement.prefill or placement.both
    if instance is None:
        return np.zeros(len(workload))
    step = instance.step
    constant, per_token, per_square = step.prefill
    squares = workload.prompts.astype(np.float64) ** 2
    own_ms = (per_token * workload.prompts + per_square * squares) / step.stages
    fixed_ms = constant / step.stages + step.prefill_hop
    busy_ms = own_ms + step.first_stage[1] * workload.prompts
    arrivals_ms = workload.arrivals_ms(rate)
    served_ms = np.cumsum(busy_ms)
    ends_ms = served_ms + np.maximum.accumulate(arrivals_ms - (served_ms - busy_ms))
    later_ms = (step.stages - 1) * (own_ms + fixed_ms)
    floor: Floats = (ends_ms - arrivals_ms + fixed_ms + step.first_stage[0] + later_ms) * _SLACK
    return floor


def tpot_floor_ms(placement: Placement, workload: Workload) -> Floats:
    """Under the mean time per token of each request: it is decoded in the cheaper kind of batch, at its smallest."""
    instance = placement.decode or placement.both
    if instance is None:
        return np.zeros(len(workload))
    step = instance.step
    context = workload.prompts + (workload.outputs - 1) / 2
    constant, per_token, per_sequence = step.decode_small
    small_ms = constant + per_token * (context + 1) + per_sequence
    constant, per_token, per_sequence = step.decode_large
    large_ms = constant + per_token * (context + 1) + per_sequence * step.large_from
    floor: Floats = (np.minimum(small_ms, large_ms) + step.first_stage[0] + step.first_stage[1] * context) * _SLACK
    return floor


def _decode_work_ms(placement: Placement, workload: Workload) -> Floats:
    """How long each request at least occupies the first decode stage, if all steps are as full as they can be."""
    instance = placement.decode or placement.both
    if instance is None:
        return np.zeros(len(workload))
    step = instance.step
    constant, per_token, per_sequence = (min(pair) for pair in zip(step.decode_small, step.decode_large, strict=True))
    outputs = workload.outputs.astype(np.float64)
    context = outputs * workload.prompts + outputs * (outputs - 1) / 2
    shared = (constant / step.stages + step.first_stage[0]) / step.decode_tokens_max
    work: Floats = (per_token / step.stages + shared) * (context + outputs)
    work += per_sequence / step.stages * outputs + step.first_stage[1] * context
    return work * _SLACK


def _may_pass(
    placement: Placement, workload: Workload, rate: float, slo: Slo, tpot_ms: Floats, work_ms: Floats
) -> bool:
    misses = slo.misses_max(len(workload))
    late_first = ttft_floor_ms(placement, workload, rate) > slo.ttft_ms
    late_tokens = tpot_ms > slo.tpot_ms
    late = [late_first | late_tokens] if slo.joint else [late_first, late_tokens]
    if max(int(flags.sum()) for flags in late) > misses:
        return False
    # whoever is in time in both leaves by its deadline, and its work was done by then
    wait_ms = 0.0 if placement.prefill is None and placement.both is None else slo.ttft_ms
    deadlines_ms = workload.arrivals_ms(rate) + wait_ms + slo.tpot_ms * workload.outputs
    order = np.argsort(deadlines_ms, kind="stable")
    excused_ms = np.sort(work_ms)[::-1][: misses if slo.joint else 2 * misses].sum()
    begin_ms = workload.unit_gaps[0] * 1000.0 / rate
    return bool(np.all(np.cumsum(work_ms[order]) - excused_ms <= deadlines_ms[order] - begin_ms))
