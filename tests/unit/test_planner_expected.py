"""Goodput of every configuration that the published simulator can run, and what it found best."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import planner_cases as cases
from zipserve.planner.bounds import ceiling
from zipserve.planner.goal import Slo
from zipserve.planner.search import Ranking, goodput, rank
from zipserve.planner.simulation import passes, simulate
from zipserve.planner.space import Devices, Space, colocated, paired, pairs

CASES: list[dict[str, Any]] = cases.load("expected.json")
COLUMNS = {(300, False): 1, (300, True): 2, (1000, False): 3, (1000, True): 4}


@pytest.fixture(params=CASES, ids=lambda case: f"{case['id']}-{case['backend']}")
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("requests", [300, 1000])
def test_goodput_of_every_configuration(case: dict[str, Any], requests: int, joint: bool) -> None:
    exhaustive = _rank(case, requests, joint, prune=False)
    found = {candidate.placement.shape: candidate.goodput for candidate in exhaustive.candidates}
    column = COLUMNS[requests, joint]
    wanted = {tuple(row[0]): row[column] for row in case["rows"]}
    assert found == wanted
    assert len(found) + len(exhaustive.infeasible) == case["enumerated"]
    if (requests, joint) == (300, False):
        assert exhaustive.best is not None
        assert list(exhaustive.best.placement.shape) == case["best_config"]
        assert exhaustive.best.goodput == case["best_goodput_per_gpu"]


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_pruning_never_loses_the_winner(case: dict[str, Any], joint: bool) -> None:
    load, slo = _load(case, 300), _slo(case, joint)
    rate_max = case["max_per_gpu_rate"]
    pruned = _rank(case, 300, joint, prune=True)
    wanted = {tuple(row[0]): row[COLUMNS[300, joint]] for row in case["rows"]}
    assert pruned.best is not None
    assert pruned.best.goodput == max(wanted.values())
    best = [shape for shape, found in wanted.items() if found == pruned.best.goodput]
    assert pruned.best.rank == min((-wanted[shape], _devices(shape), shape) for shape in best)
    for candidate in pruned.candidates:
        goodput_found = wanted[candidate.placement.shape]
        assert goodput_found <= candidate.ceiling == ceiling(candidate.placement, load, slo, rate_max)
        assert candidate.goodput in (None, goodput_found)
        assert (goodput_found == 0) == bool(candidate.why) or candidate.goodput is None


def test_bisection_and_curves(case: dict[str, Any]) -> None:
    placement = cases.placement(case["model"], case["backend"], case["best_config"])
    load, slo = _load(case, case["N"]), _slo(case, joint=False)
    for rate, passed, attained in case["bisect_trace"]:
        total = rate * placement.devices
        outcome = simulate(placement, load, total)
        assert passes(placement, load, total, slo) is passed
        assert slo.attained(outcome.ttft_ms, outcome.tpot_ms) == pytest.approx(attained, abs=1e-12)
    for total, requests, *wanted in case["curve"]:
        outcome = simulate(placement, _load(case, requests), total)
        ttft_ms, tpot_ms = outcome.ttft_ms, outcome.tpot_ms
        found = [
            np.mean(ttft_ms <= slo.ttft_ms),
            np.mean(tpot_ms <= slo.tpot_ms),
            slo.attained(ttft_ms, tpot_ms),
            *np.percentile(ttft_ms, (50, 99)),
            *np.percentile(tpot_ms, (50, 99)),
        ]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_a_search_takes_milliseconds_per_placement() -> None:
    """A far wider bound than what is measured, so that a busy machine does not decide."""
    load, slo = cases.trace("sharegpt", "poisson", 300), Slo(250.0, 100.0)
    placement = cases.placement("facebook/opt-13b", "distserve", [2, 1, 1, 2])
    goodput(placement, load, slo, 8.0)
    begin = time.process_time()
    for _ in range(10):
        goodput(placement, load, slo, 8.0)
    assert time.process_time() - begin < 10 * 0.25


def _rank(case: dict[str, Any], requests: int, joint: bool, prune: bool) -> Ranking:
    load = _load(case, requests)
    spaces: dict[bool, Callable[..., Space]] = {True: pairs, False: paired}
    space = colocated if case["backend"] == "vllm" else spaces[case["high_affinity"]]
    devices = Devices(case["num_node"], case["gpus_per_node"])
    found = space(cases.profile().model(case["model"]), devices, load)
    return rank(found, load, _slo(case, joint), case["max_per_gpu_rate"], prune=prune)


def _load(case: dict[str, Any], requests: int) -> Any:
    return cases.trace(case["workload"], case["arrival"], requests)


def _slo(case: dict[str, Any], joint: bool) -> Slo:
    return Slo(case["ttft_slo_ms"], case["tpot_slo_ms"], case["attainment"], joint)


def _devices(shape: tuple[int, ...]) -> int:
    if len(shape) == 2:
        return shape[0] * shape[1]
    return shape[0] * (shape[1] * shape[2] + shape[3] * shape[4])
