"""Objectives, when a run is given up for them, and the goodput of our own clusters."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import native_cases as cases
from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.goodput import Goodput, drawn, goodput, passes
from zipserve.planner.native.objectives import GapObjective, Objective, Slo
from zipserve.planner.native.profile import Link
from zipserve.planner.native.simulation import attempt, simulate
from zipserve.planner.native.traffic import Traffic, traffic
from zipserve.planner.native.workers import DecodeWorker, Kv, PrefillWorker, Router
from zipserve.planner.trace import draw
from zipserve.planner.workload import workload

RATE = 1000.0
_limits = st.sampled_from([math.inf, 2.0, 5.0, 9.0, 14.0, 30.0])
_shares = st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0])
_classes = st.sampled_from([None, 0, 1])
_objectives = st.one_of(
    st.builds(Objective, st.integers(2, 40).map(float), _limits, _limits, _limits, _shares, _classes),
    st.builds(Objective, _limits, _limits, st.integers(2, 20).map(float), _limits, _shares, _classes),
    st.builds(GapObjective, st.integers(2, 12).map(float), _shares, _classes),
)


@given(cluster=cases.clusters(), load=cases.loads(), objectives=st.lists(_objectives, min_size=1, max_size=3))
def test_a_run_is_given_up_exactly_when_an_objective_is_missed(
    cluster: Cluster, load: Traffic, objectives: list[Objective | GapObjective]
) -> None:
    load = traffic(load, load.cached, load.found, [0, 1, *load.classes[2:]])  # both classes have requests
    slo = Slo(*objectives)
    outcome, complete = attempt(cluster, load, RATE, slo.goal(load))
    whole = simulate(cluster, load, RATE)
    assert complete == slo.kept(whole)
    assert passes(cluster, load, RATE, slo) == complete
    if complete:
        np.testing.assert_array_equal(outcome.e2e_ms, whole.e2e_ms)


def test_shares_are_counted_jointly_one_by_one_and_by_class() -> None:
    cluster = cases.pair_of(cases.model(1, token=1), cases.model(1, row=1), slots=2)
    load = traffic(cases.load_of([(0, 4, 2), (100, 8, 2), (100, 2, 8), (100, 2, 1)]), classes=[0, 0, 1, 1])
    outcome = simulate(cluster, load, RATE)
    assert outcome.ttft_ms.tolist() == [5, 9, 3, 3]
    assert outcome.e2e_ms.tolist() == [9, 13, 19, 5]
    assert Objective(ttft_ms=5).attained(outcome) == 0.75
    assert Objective(ttft_ms=5, e2e_ms=9).attained(outcome) == 0.5
    assert Objective(ttft_ms=5, of=0).attained(outcome) == 0.5
    assert Objective(ttft_ms=5, of=1).attained(outcome) == 1.0
    assert GapObjective(2).attained(outcome) == 1.0
    assert Slo(Objective(ttft_ms=5, share=0.75), Objective(e2e_ms=13, share=0.75)).kept(outcome)
    assert not Slo(Objective(ttft_ms=5, e2e_ms=13, share=0.75)).kept(outcome)


def test_what_is_refused_keeps_nothing() -> None:
    cluster = Cluster([], cases.alone(cases.model(10)).decodes, router=Router(-1, requests_max=1))
    load = cases.load_of([(0, 4, 3), (1, 4, 1), (100, 4, 3)])
    outcome = simulate(cluster, load, RATE)
    assert Objective(e2e_ms=1e9).attained(outcome) == 2 / 3
    assert GapObjective(1e9).attained(outcome) == 6 / 7
    for one in (Objective(e2e_ms=1e9, share=0.7), GapObjective(1e9, share=0.9)):
        assert not passes(cluster, load, RATE, Slo(one))
    for one in (Objective(e2e_ms=1e9, share=0.6), GapObjective(1e9, share=0.85)):
        assert passes(cluster, load, RATE, Slo(one))


SLO = Slo(Objective(ttft_ms=150, tpot_ms=30, gap_ms=90))
PROMPTS = draw("humaneval", "poisson", 400, seed=0)


def _pair(bytes_per_s: float = 5e7, block_bytes: int = 1 << 20, workers: int = 1) -> Cluster:
    kv = Kv(128, block_bytes, block_bytes)
    prefill = PrefillWorker(cases.model(4, token=0.1), kv, 256, 16, 128)
    decode = DecodeWorker(cases.model(8, row=0.5, context=1e-3), kv, 16, 64)
    return Cluster([prefill] * workers, [decode] * workers, [Link(bytes_per_s, 1.0)] * workers)


def test_more_bandwidth_fewer_bits_and_more_workers_serve_no_less() -> None:
    def rates(*cluster: float | int) -> list[float]:
        return list(goodput(_pair(*cluster), PROMPTS, SLO, 64.0).rates)  # type: ignore[arg-type]

    noise = 64.0 / 256 * 2
    slow, middle, fast = rates(1e7), rates(5e7), rates(5e9)
    assert min(np.subtract(middle, slow)) >= -noise
    assert min(np.subtract(fast, middle)) >= -noise
    assert np.mean(fast) > np.mean(slow)
    assert min(np.subtract(rates(2e7, 1 << 18), rates(2e7))) >= -noise
    assert min(np.subtract(rates(5e7, 1 << 20, 2), middle)) > 0


def test_draws_are_the_same_for_everybody_and_differ_by_seed() -> None:
    first, again, other = (drawn(PROMPTS, seed, 5, "gamma") for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.unit_gaps, again.unit_gaps)
    np.testing.assert_array_equal(first.prompts, other.prompts)
    assert not np.array_equal(first.unit_gaps, other.unit_gaps)


def test_a_replay_goes_round() -> None:
    load = traffic(workload([1, 2, 3, 4], [5, 6, 7, 8], [0.0, 1.0, 2.0, 3.0]), classes=[0, 1, 0, 1])
    second = drawn(load, seed=1, seeds=2, arrivals="replay")
    assert second.prompts.tolist() == [3, 4, 1, 2]
    assert second.classes.tolist() == [0, 1, 0, 1]
    assert second.unit_gaps.tolist() == [0.0, 3.0, 2.0, 1.0]
    assert drawn(load, seed=0, seeds=2, arrivals="replay").prompts.tolist() == [1, 2, 3, 4]


def test_a_replay_is_as_fast_wherever_it_begins() -> None:
    gaps = [0.0] + [0.1] * 49 + [50.0] + [0.1] * 49
    load = traffic(workload([8] * 100, [8] * 100, gaps))
    means = [float(drawn(load, seed, 5, "replay").unit_gaps[1:].mean()) for seed in range(5)]
    assert means == pytest.approx([np.mean(gaps[1:])] * 5)


def test_the_interval_is_of_the_mean() -> None:
    found = Goodput((2.0, 3.0, 4.0, 5.0, 6.0))
    assert found.mean == 4
    assert found.half_width == pytest.approx(2.776 * np.std([2, 3, 4, 5, 6], ddof=1) / math.sqrt(5))
    assert found.interval == pytest.approx((4 - found.half_width, 4 + found.half_width))
    assert Goodput((2.0,)).interval == (0.0, math.inf)
    assert Goodput(tuple(float(i % 2) for i in range(40))).half_width == pytest.approx(
        1.96 * 0.5064 / math.sqrt(40), 1e-3
    )


def test_why_there_is_none() -> None:
    cluster = _pair()
    none = goodput(cluster, PROMPTS, Slo(Objective(ttft_ms=1e3, tpot_ms=5)), 8.0, seeds=(0,))
    assert none.mean == 0
    assert "with nothing else running 90 % of the requests have a TPOT of at most 10." in none.why
    assert none.why.endswith("the limit is 5 ms")
    gaps = goodput(cluster, PROMPTS, Slo(GapObjective(8)), 8.0, seeds=(0,))
    assert "99 % of the gaps are at most" in gaps.why
    high = goodput(cluster, PROMPTS, Slo(Objective(ttft_ms=40, share=0.9)), 1e5, seeds=(0,))
    assert high.why == "the objectives are kept with nothing else running, not at the lowest rate tried, 390.625/s"


def test_questions_that_make_no_sense() -> None:
    cluster = _pair()
    for words, ask in (
        ("limit on TTFT is 0 ms", lambda: Objective(ttft_ms=0)),
        ("limit on GAP is nan ms", lambda: GapObjective(math.nan)),
        ("without a limit", Objective),
        ("share of 1.5", lambda: Objective(ttft_ms=1, share=1.5)),
        ("there are 0 objectives", Slo),
        ("class 7 has no requests, there are 0", lambda: Slo(Objective(ttft_ms=1, of=7)).goal(traffic(PROMPTS))),
        ("rates up to 0", lambda: goodput(cluster, PROMPTS, SLO, 0.0)),
        ("no seeds", lambda: goodput(cluster, PROMPTS, SLO, 1.0, seeds=())),
        ("'fixed' arrivals", lambda: goodput(cluster, PROMPTS, SLO, 1.0, arrivals="fixed")),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            ask()


def test_a_workload_keeps_its_columns_when_it_is_cut() -> None:
    load = traffic(PROMPTS, cached=1, classes=np.arange(len(PROMPTS)))
    assert load.first(3).classes.tolist() == [0, 1, 2]
    assert replace(load, unit_gaps=load.unit_gaps).cached.sum() == len(load)
