"""Bounds, spaces, copies, and what the planner says when there is no answer."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner_cases as cases
from zipserve.common.errors import InvalidRequestError
from zipserve.planner.bounds import tpot_floor_ms, ttft_floor_ms
from zipserve.planner.goal import Slo
from zipserve.planner.plan import COLOCATED, Question, make_plan
from zipserve.planner.search import Candidate, Ranking, copies, copies_apart, goodput, rank
from zipserve.planner.simulation import Placement, simulate, simulate_copies
from zipserve.planner.space import Devices, Space, colocated, paired, pairs, phase
from zipserve.planner.workload import Workload, workload

MODEL = cases.profile().model("facebook/opt-13b")
LOAD = cases.trace("sharegpt", "poisson", 300)
NODE = Devices(1, 8)
SLO = Slo(250.0, 100.0)
QUESTION = Question(MODEL, NODE, LOAD, SLO, "pairs", rate_max=8.0)

_lengths = st.tuples(st.floats(0, 3), st.integers(1, 2000), st.integers(1, 60))
_placements = st.sampled_from(
    [
        *pairs(MODEL, NODE, LOAD).placements,
        *colocated(MODEL, NODE, LOAD).placements,
        *phase(MODEL, NODE, LOAD, prefill=True).placements,
        *phase(MODEL, NODE, LOAD, prefill=False).placements,
    ]
)


@given(st.lists(_lengths, min_size=2, max_size=30), _placements, st.floats(0.1, 50))
def test_no_simulation_beats_the_floors(rows: list[tuple[float, int, int]], placement: Placement, rate: float) -> None:
    load = _load(rows)
    outcome = simulate(placement, load, rate)
    assert (outcome.ttft_ms >= ttft_floor_ms(placement, load, rate)).all()
    assert (outcome.tpot_ms >= tpot_floor_ms(placement, load)).all()


@settings(max_examples=60)
@given(
    rows=st.lists(_lengths, min_size=2, max_size=30),
    placement=_placements,
    ttft_ms=st.floats(20, 800),
    tpot_ms=st.floats(10, 150),
    joint=st.booleans(),
    attainment=st.sampled_from([0.5, 0.9, 0.99]),
)
def test_no_goodput_beats_its_ceiling(
    rows: list[tuple[float, int, int]],
    placement: Placement,
    ttft_ms: float,
    tpot_ms: float,
    joint: bool,
    attainment: float,
) -> None:
    load = _load(rows)
    from_slo = Slo(ttft_ms, tpot_ms, attainment, joint)
    exact = rank(Space([placement]), load, from_slo, 16.0, prune=False).candidates[0].goodput
    assert goodput(placement, load, from_slo, 16.0) == exact


def test_a_phase_by_itself_has_the_times_it_has_in_a_pair() -> None:
    pair = cases.placement("facebook/opt-13b", "distserve", [2, 2, 1, 2])
    both = simulate(pair, LOAD, 6.0)
    assert simulate(Placement(pair.prefill, None), LOAD, 6.0).ttft_ms.tolist() == both.ttft_ms.tolist()
    assert not simulate(Placement(None, pair.decode), LOAD, 6.0).ttft_ms.any()


@given(nodes=st.integers(1, 4), per_node=st.integers(1, 8))
def test_kv_of_paired_segments_never_leaves_a_node(nodes: int, per_node: int) -> None:
    space = paired(MODEL, Devices(nodes, per_node), LOAD)
    shapes = [placement.shape for placement in space.placements] + [shape for shape, _ in space.infeasible]
    assert len(shapes) == len(set(shapes))
    for segments, tensor, pipeline, decode_tensor, decode_pipeline in shapes:
        assert segments <= nodes
        assert tensor * pipeline + decode_tensor * decode_pipeline <= per_node
        # a segment has whole layers, so that both sides cut the model at the same ones
        assert MODEL.layers % (segments * pipeline) == MODEL.layers % (segments * decode_pipeline) == 0
    assert all(placement.devices <= nodes * per_node for placement in space.placements)


def test_one_copy_of_each_is_a_pair() -> None:
    pair = cases.placement("facebook/opt-13b", "distserve", [2, 2, 1, 2])
    assert pair.prefill is not None
    assert pair.decode is not None
    together = simulate(pair, LOAD, 6.0)
    copied = simulate_copies(pair.prefill, 1, pair.decode, 1, LOAD, 6.0)
    np.testing.assert_array_equal(copied.ttft_ms, together.ttft_ms)
    np.testing.assert_array_equal(copied.tpot_ms, together.tpot_ms)
    # more of each relieve the others: nobody waits longer on the whole
    more = simulate_copies(pair.prefill, 3, pair.decode, 2, LOAD, 6.0)
    assert more.ttft_ms.mean() < together.ttft_ms.mean()
    assert more.tpot_ms.mean() < together.tpot_ms.mean()


def test_phases_found_apart_are_simulated_together() -> None:
    deployment = make_plan(replace(QUESTION, search="apart")).deployments["apart"]
    (prefills, first), (decodes, second) = deployment.parts
    assert first.prefill is not None
    assert second.decode is not None
    outcome = simulate_copies(first.prefill, prefills, second.decode, decodes, LOAD, deployment.rate)
    kept = (outcome.ttft_ms <= SLO.ttft_ms) & (outcome.tpot_ms <= SLO.tpot_ms)
    assert deployment.attained == kept.mean()
    assert deployment.attained is not None
    # each phase keeps its limit for 90 %, so that at least 80 % would keep both if copies changed nothing
    assert 0.5 < deployment.attained < 1


def test_every_shape_is_feasible_or_explained() -> None:
    space = pairs(cases.profile().model("facebook/opt-66b"), NODE, LOAD)
    assert len(space.placements) + len(space.infeasible) == 61
    reasons = {why for _, why in space.infeasible}
    assert any("no step times for tensor 1; there are: 2, 3, 4, 8" in why for why in reasons)
    huge = workload([100_000], [5], [0.0])
    whys = [why for _, why in colocated(MODEL, NODE, huge).infeasible]
    assert "a prompt has 100000 tokens, tensor 1 × pipeline 1 holds 66144" in whys
    long = workload([40_000], [20_000], [0.0])
    assert {why.partition(",")[0] for _, why in phase(MODEL, NODE, long, prefill=False).infeasible[:1]} == {
        "a sequence grows to 60000 tokens"
    }


def test_algorithm_1_takes_as_many_of_each_phase_as_the_rate_needs() -> None:
    prefills, decodes = (
        rank(phase(MODEL, NODE, LOAD, prefill=prefill), LOAD, slo, 8.0)
        for prefill, slo in ((True, replace(SLO, tpot_ms=math.inf)), (False, replace(SLO, ttft_ms=math.inf)))
    )
    best = [ranking.candidates[0] for ranking in (prefills, decodes)]
    served = [(one.goodput or 0) * one.placement.devices for one in best]
    deployment = copies_apart(prefills, decodes, Devices(8, 8), 60.0)
    assert [placement for _, placement in deployment.parts] == [one.placement for one in best]
    assert [count for count, _ in deployment.parts] == [math.ceil(60.0 / one) for one in served]
    assert deployment.rate >= 60.0
    with pytest.raises(InvalidRequestError, match=r"60 requests/s need .* devices, 8 are there") as refused:
        copies_apart(prefills, decodes, NODE, 60.0)
    assert refused.value.field == "devices"


def test_algorithm_1_without_a_rate_takes_the_best_ratio_that_fits() -> None:
    def ranking(*found: tuple[list[int], float], prefill: bool) -> Ranking:
        pairs_found = [(cases.placement("facebook/opt-13b", "distserve", config), rate) for config, rate in found]
        return Ranking([
            Candidate(Placement(pair.prefill, None) if prefill else Placement(None, pair.decode), 8.0, rate)
            for pair, rate in pairs_found
        ])  # fmt: skip

    prefills = ranking(([4, 2, 1, 1], 7.0), ([1, 1, 1, 1], 6.0), prefill=True)
    decodes = ranking(([1, 1, 1, 1], 2.0), ([1, 1, 2, 1], 1.0), prefill=False)
    deployment = copies_apart(prefills, decodes, Devices(1, 8), None)
    # the prefill instance with the most goodput would leave nothing for decode
    assert [(count, placement.devices) for count, placement in deployment.parts] == [(1, 1), (3, 1)]
    assert deployment.goodput == 1.5
    with pytest.raises(InvalidRequestError, match="need more than the 1 devices that are there"):
        copies_apart(prefills, decodes, Devices(1, 1), None)


def test_copies_of_a_pair_serve_the_rate() -> None:
    best = rank(pairs(MODEL, NODE, LOAD), LOAD, SLO, 8.0).best
    assert best is not None
    each = (best.goodput or 0) * best.placement.devices
    deployment = copies(best, Devices(4, 8), each * 2.5)
    assert deployment.parts[0][0] == 3
    assert deployment.goodput == pytest.approx(best.goodput)


@pytest.mark.parametrize("search", ["pairs", "paired", "apart"])
def test_a_plan_names_the_better_arrangement(search: str) -> None:
    plan = make_plan(replace(QUESTION, search=search))
    name, best = plan.best
    assert set(plan.deployments) == {search, COLOCATED}
    assert best.goodput == max(one.goodput for one in plan.deployments.values())
    assert name == search
    assert best.devices <= NODE.total


def test_a_lowest_rate_that_is_too_high_is_named() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"even at the lowest rates tried, from 390.625/s per device on"
    ) as no:
        make_plan(replace(QUESTION, rate_max=1e5))
    assert no.value.field == "rate_max"


def test_it_may_answer_not_to_disaggregate() -> None:
    """On one device nothing can be apart."""
    plan = make_plan(replace(QUESTION, devices=Devices(1, 1), slo=Slo(2000.0, 150.0)))
    assert plan.best[0] == COLOCATED
    assert "too few devices" in plan.refused["pairs"].message


@pytest.mark.parametrize(
    ("slo", "field", "why"),
    [
        (Slo(20.0, 100.0), "slo_ttft", r"no placement meets TTFT 20 ms; .* have a TTFT of \d+\.\d+ ms"),
        (Slo(250.0, 5.0), "slo_tpot", r"no placement meets TPOT 5 ms; .* have a TPOT of \d+\.\d+ ms"),
    ],
)
def test_the_binding_limit_is_named(slo: Slo, field: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as refused:
        make_plan(replace(QUESTION, slo=slo))
    assert refused.value.field == field


@pytest.mark.parametrize("nodes", [0, 1])
def test_no_devices_are_refused(nodes: int) -> None:
    with pytest.raises(InvalidRequestError, match="no devices") as refused:
        Devices(nodes, 1 - nodes)
    assert refused.value.field == "devices"


@pytest.mark.parametrize(
    ("limits", "why"),
    [((0.0, 100.0, 0.9), "TTFT is 0 ms"), ((250.0, -1.0, 0.9), "TPOT is -1 ms"), ((math.nan, 1.0, 0.9), "TTFT is nan"),
     ((250.0, 100.0, 1.5), "attainment of 1.5")],
)  # fmt: skip
def test_impossible_limits_are_refused(limits: tuple[float, float, float], why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        Slo(*limits)


def _load(rows: list[tuple[float, int, int]]) -> Workload:
    gaps, prompts, outputs = zip(*rows, strict=True)
    return workload(prompts, outputs, [0.0, *gaps[1:-1], 1.0])
