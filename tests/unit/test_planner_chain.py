"""The simulated chain: against the published simulator's times, against a plain one, and by its invariants."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner_cases as cases
from planner_oracle import Oracle, Request
from zipserve.planner import chain
from zipserve.planner.chain import Goal, StepTime
from zipserve.planner.goal import Slo, unlimited
from zipserve.planner.simulation import passes, simulate
from zipserve.planner.workload import workload

GOLDEN: dict[str, Any] = cases.load("golden/index.json")
WITHIN_MS = 1e-6


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['backend']}-{case['config']}")
def test_hand_checkable_cases(case: dict[str, Any]) -> None:
    requests = GOLDEN["requests"]
    five = workload(
        [r["prompt"] for r in requests], [r["output"] for r in requests], [r["gap_ms"] / 1000 for r in requests]
    )
    outcome = simulate(cases.placement(case["model"], case["backend"], case["config"]), five, rate=1.0)
    np.testing.assert_allclose(outcome.ttft_ms, case["ttft_ms"], rtol=0, atol=WITHIN_MS)
    np.testing.assert_allclose(outcome.tpot_ms, case["tpot_ms"], rtol=0, atol=WITHIN_MS)


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: run["id"])
def test_golden_runs(run: dict[str, Any]) -> None:
    load = cases.trace(run["workload"], run["gap"], run["N"])
    placement = cases.placement(run["model"], run["backend"], run["config"])
    outcome = simulate(placement, load, run["rate_total"])
    ttft_ms, tpot_ms = cases.golden_times(run["id"])
    np.testing.assert_allclose(outcome.ttft_ms, ttft_ms, rtol=0, atol=WITHIN_MS)
    np.testing.assert_allclose(outcome.tpot_ms, tpot_ms, rtol=0, atol=WITHIN_MS)
    for percentile, wanted in run["p"].items():
        found = [np.percentile(times, int(percentile)) for times in (outcome.ttft_ms, outcome.tpot_ms)]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=WITHIN_MS)


# small whole numbers, so that many events fall on the same instant; all sums are exact
_whole = st.integers(0, 3).map(float)
_costs = st.tuples(st.integers(1, 4).map(float), _whole, _whole)


@st.composite
def _steps(draw: st.DrawFn) -> StepTime:
    stages = draw(st.sampled_from([1, 2, 4]))
    return StepTime(
        stages=stages,
        prefill=draw(_costs),
        prefill_hop=draw(_whole),
        decode_small=draw(_costs),
        decode_large=draw(_costs),
        large_from=draw(st.integers(1, 4)),
        first_stage=(draw(_whole), draw(_whole)),
        prefill_tokens_max=draw(st.integers(6, 20)),
        decode_tokens_max=draw(st.integers(13, 40)),
    )


_requests = st.lists(
    st.tuples(st.integers(0, 12).map(float), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=14
)
_roles = st.sampled_from([(True, True), (True, False), (False, True)])


@given(step=_steps(), requests=_requests, roles=_roles)
def test_agrees_with_the_plain_simulation(
    step: StepTime, requests: list[tuple[float, int, int]], roles: tuple[bool, bool]
) -> None:
    first_ms, done_ms, complete = _run(step, requests, roles, unlimited(len(requests)))
    oracle = _oracle(step, requests, roles)
    assert complete
    np.testing.assert_array_equal(first_ms, [request.first_ms for request in oracle.requests])
    np.testing.assert_array_equal(done_ms, [request.done_ms for request in oracle.requests])
    assert all(count > 0 and total <= step.decode_tokens_max for count, total in oracle.steps)


@given(step=_steps(), requests=_requests, roles=_roles, limit=st.integers(1, 60), misses=st.integers(0, 4))
def test_gives_up_exactly_when_too_many_are_late(
    step: StepTime, requests: list[tuple[float, int, int]], roles: tuple[bool, bool], limit: int, misses: int
) -> None:
    count = len(requests)
    oracle = _oracle(step, requests, roles).requests
    late_first = [roles[0] and r.first_ms - r.arrival_ms >= limit for r in oracle]
    late_tokens = [roles[1] and (r.done_ms - r.first_ms) / r.output >= limit / 2 for r in oracle]
    late_either = [first or tokens for first, tokens in zip(late_first, late_tokens, strict=True)]
    for which, late in enumerate((late_first, late_tokens, late_either)):
        allowed = [count] * 3
        allowed[which] = misses
        complete = _run(step, requests, roles, Goal(float(limit), limit / 2, *allowed))[2]
        assert complete == (sum(late) <= misses)


@given(requests=_requests, step=_steps(), slower=st.integers(2, 3))
def test_a_scaled_clock_scales_all_times(requests: list[tuple[float, int, int]], step: StepTime, slower: int) -> None:
    def scaled(costs: tuple[float, ...]) -> Any:
        return tuple(cost * slower for cost in costs)

    slow = step._replace(
        prefill=scaled(step.prefill),
        prefill_hop=step.prefill_hop * slower,
        decode_small=scaled(step.decode_small),
        decode_large=scaled(step.decode_large),
        first_stage=scaled(step.first_stage),
    )
    later = [(arrival * slower, prompt, output) for arrival, prompt, output in requests]
    goal = unlimited(len(requests))
    first_ms, done_ms, _ = _run(step, requests, (True, True), goal)
    slow_first_ms, slow_done_ms, _ = _run(slow, later, (True, True), goal)
    np.testing.assert_allclose(slow_first_ms, first_ms * slower)
    np.testing.assert_allclose(slow_done_ms, done_ms * slower)


@pytest.mark.parametrize("backend", ["distserve", "vllm"])
def test_decode_time_grows_with_batch_and_context(backend: str) -> None:
    config = [1, 1, 1, 1] if backend == "distserve" else [1, 1]
    placement = cases.placement("facebook/opt-13b", backend, config)

    def tpot_ms(sequences: int, prompt: int) -> float:
        load = workload([prompt] * sequences, [50] * sequences, [0.0, *[1e-9] * (sequences - 1)])
        return float(simulate(placement, load, rate=1.0).tpot_ms.mean())

    assert tpot_ms(1, 100) < tpot_ms(4, 100) < tpot_ms(16, 100)
    assert tpot_ms(4, 100) < tpot_ms(4, 400) < tpot_ms(4, 1600)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("ttft_ms", "tpot_ms"), [(250.0, 100.0), (120.0, 60.0), (math.inf, 55.0), (180.0, math.inf)])
@pytest.mark.parametrize("config", [[2, 1, 1, 2], [4, 1]])
def test_passing_is_the_same_with_and_without_giving_up(
    config: list[int], ttft_ms: float, tpot_ms: float, joint: bool
) -> None:
    placement = cases.placement("facebook/opt-13b", "vllm" if len(config) == 2 else "distserve", config)
    load = cases.trace("sharegpt", "poisson", 300)
    slo = Slo(ttft_ms, tpot_ms, joint=joint)
    verdicts = []
    for rate in (0.5, 2.0, 4.0, 6.0, 9.0, 20.0):
        outcome = simulate(placement, load, rate)
        verdicts.append(slo.kept(outcome.ttft_ms, outcome.tpot_ms))
        assert passes(placement, load, rate, slo) == verdicts[-1]
    assert verdicts[-1] is False


def _run(step: StepTime, requests: list[tuple[float, int, int]], roles: tuple[bool, bool], goal: Goal) -> Any:
    arrivals_ms, prompts, outputs = _columns(requests)
    return chain.run(arrivals_ms, prompts, outputs, np.zeros(len(requests), np.bool_), step, *roles, goal)


def _oracle(step: StepTime, requests: list[tuple[float, int, int]], roles: tuple[bool, bool]) -> Oracle:
    arrivals_ms, prompts, outputs = _columns(requests)
    rows = zip(arrivals_ms.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    oracle = Oracle(
        [Request(number, *row) for number, row in enumerate(rows)], step, prefills=roles[0], decodes=roles[1]
    )
    oracle.run()
    return oracle


def _columns(requests: list[tuple[float, int, int]]) -> tuple[Any, Any, Any]:
    gaps, prompts, outputs = zip(*requests, strict=True)
    return np.cumsum(np.array(gaps)), np.array(prompts, np.int64), np.array(outputs, np.int64)
