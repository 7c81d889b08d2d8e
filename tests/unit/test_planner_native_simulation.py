"""The simulation of our own cluster: against the services' own schedulers in a plain loop, by hand, and by what holds
for any cluster."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import native_cases as cases
from native_oracle import Oracle
from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native import columns as c
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.lateness import NO_GOAL
from zipserve.planner.native.profile import Link
from zipserve.planner.native.simulation import Outcome, play, simulate
from zipserve.planner.native.traffic import Traffic, traffic
from zipserve.planner.native.workers import DecodeWorker, Kv, PrefillWorker, Router
from zipserve.planner.trace import draw
from zipserve.planner.workload import workload

RATE = 1000.0


@settings(max_examples=400)
@given(cluster=cases.clusters(), load=cases.loads())
def test_agrees_with_the_services_own_schedulers(cluster: Cluster, load: Traffic) -> None:
    outcome = simulate(cluster, load, RATE)
    oracle = Oracle(cluster, load, RATE)
    oracle.run()
    np.testing.assert_array_equal(outcome.ttft_ms, [call.ttft_ms for call in oracle.calls])
    ends = np.cumsum(load.outputs)
    for call, end in zip(oracle.calls, ends, strict=True):
        assert outcome.served[call.number] == (call.done_ms < np.inf)
        if outcome.served[call.number]:
            np.testing.assert_array_equal(outcome.all_gaps_ms[end - call.output : end], call.gaps_ms)
            assert outcome.e2e_ms[call.number] - outcome.ttft_ms[call.number] == call.done_ms - call.first_ms
    assert [use.parkings for use in outcome.decodes] == [decode.parkings for decode in oracle.decodes]


@given(cluster=cases.clusters(), load=cases.loads())
def test_nothing_is_held_beyond_what_there_is_nor_after_the_end(cluster: Cluster, load: Traffic) -> None:
    state, complete = play(cluster, load, RATE, NO_GOAL)
    outcome = simulate(cluster, load, RATE)
    assert complete
    workers: list[PrefillWorker | DecodeWorker] = [*cluster.prefills, *cluster.decodes]
    for use, worker in zip([*outcome.prefills, *outcome.decodes], workers, strict=True):
        assert use.slots_peak <= worker.slots
        assert use.blocks_peak <= worker.blocks
        assert use.tails_peak <= worker.tails
    left = [c.SLOTS_USED, c.BLOCKS_USED, c.TAILS_USED, c.OUTSTANDING, c.RUNNING, c.PROMPTS, c.CONTEXT, c.MISSING]
    left += [c.GROWING, c.FRESH_TAILS, c.SPENT_TAILS, c.DIRTY]
    assert not state.stations[:, left].any()
    assert (state.stations[:, [c.HEAD, c.TAIL]] == c.NONE).all()
    assert not state.counters[[c.REQUESTS, c.REQUEST_TOKENS, c.DIRTY_STATIONS]].any()
    assert np.array_equal(outcome.served, np.isfinite(outcome.ttft_ms))
    assert cluster.router.requests_max < len(load) or cluster.router.tokens_max < 100 or outcome.served.all()


@given(cluster=cases.clusters(), load=cases.loads())
def test_the_same_every_time(cluster: Cluster, load: Traffic) -> None:
    first, second = simulate(cluster, load, RATE), simulate(cluster, load, RATE)
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "gap_max_ms"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_by_hand_one_request_through_a_pair() -> None:
    cluster = cases.pair_of(cases.model(10, token=2), cases.model(5, row=1, context=1), link=Link(8000.0, 3.0))
    outcome = simulate(cluster, cases.load_of([(0, 6, 2)]), RATE)
    # prompt: 10 + 6 x 2; pull: 3 fixed, 8 + 4 bytes at 8 a ms; steps: 5 + 1 + 7 and 5 + 1 + 8 of context
    assert outcome.ttft_ms[0] == 22
    assert outcome.all_gaps_ms[:2].tolist() == [3 + 1.5 + 13, 14]
    assert outcome.tpot_ms[0] == (3 + 1.5 + 13 + 14) / 2
    assert outcome.gap_max_ms[0] == 17.5
    assert outcome.e2e_ms[0] == 22 + 17.5 + 14


def test_by_hand_a_short_prompt_overtakes_a_long_one() -> None:
    cluster = cases.pair_of(cases.model(1, token=1), cases.model(1), step_tokens=8)
    outcome = simulate(cluster, cases.load_of([(0, 20, 1), (0, 3, 1)]), RATE)
    # 4 of the long one and the short one, and 1 more of the long one: 9 ms; 8, then 7 of it: 9 and 8 ms
    assert outcome.ttft_ms[:2].tolist() == [26, 9]


def test_by_hand_pairs_of_a_later_chunk_count_what_was_before() -> None:
    cluster = cases.pair_of(cases.model(1, pair=1), cases.model(1), step_tokens=3)
    outcome = simulate(cluster, cases.load_of([(0, 5, 1)]), RATE)
    assert outcome.ttft_ms[0] == (1 + 3 * 4 / 2) + (1 + 2 * 3 + 2 * 3 / 2)


def test_by_hand_pulls_queue_on_a_link() -> None:
    cluster = cases.pair_of(cases.model(1), cases.model(1), link=Link(1000.0, 0.0))
    outcome = simulate(cluster, cases.load_of([(0, 4, 1), (0, 8, 1)]), RATE)
    # 8 bytes at 1 a ms, then 16 behind them; the first is decoded meanwhile
    assert outcome.all_gaps_ms[:2].tolist() == [8 + 1, 24 + 1]


def test_by_hand_blocks_stay_on_the_prefill_worker_until_they_are_pulled() -> None:
    cluster = cases.pair_of(cases.model(1), cases.model(1), prefill_blocks=2, link=Link(1000.0, 0.0))
    outcome = simulate(cluster, cases.load_of([(0, 8, 1), (0, 4, 1)]), RATE)
    assert outcome.ttft_ms[:2].tolist() == [1, 1 + 16 + 1]


def test_by_hand_the_youngest_makes_room_and_comes_back() -> None:
    cluster = cases.pair_of(cases.model(1), cases.model(1), decode_blocks=3, kv=Kv(4, 8, 4))
    rows = [(0.0, 3, 6), (0.0, 3, 3)]
    outcome = simulate(cluster, cases.load_of(rows), RATE)
    oracle = Oracle(cluster, cases.load_of(rows), RATE)
    oracle.run()
    assert outcome.decodes[0].parkings == oracle.decodes[0].parkings
    assert outcome.all_gaps_ms[:9].tolist() == [*oracle.calls[0].gaps_ms, *oracle.calls[1].gaps_ms]


def test_by_hand_prompts_beside_a_batch_come_in_chunks_that_hold_it_up_by_little() -> None:
    cluster = cases.alone(cases.model(10, token=1), slowdown=1.8)
    outcome = simulate(cluster, cases.load_of([(0, 10, 12), (45, 20, 1)]), RATE)
    # 20 ms for the prompt, 10 a token; then 8 of the other prompt beside a token each time
    # a token of a prompt was seen to take 2 ms, so that 4 fit at first; then less, as that is learned
    assert outcome.ttft_ms[0] == 20
    gaps = outcome.all_gaps_ms[:12]
    assert gaps[0] == 10
    assert gaps.max() <= 10 + 8
    assert gaps.sum() == outcome.e2e_ms[0] - outcome.ttft_ms[0]


def test_what_is_cached_is_not_computed_and_what_is_found_is_not_pulled() -> None:
    cluster = cases.pair_of(cases.model(1, token=1), cases.model(1), link=Link(1000.0, 0.0))
    load = traffic(cases.load_of([(0, 9, 1)]), cached=[8, 0], found=[2, 0])
    outcome = simulate(cluster, load, RATE)
    assert outcome.ttft_ms[0] == 2
    assert outcome.all_gaps_ms[0] == 4 + 1  # the tail


def test_the_router_spreads_what_comes_over_equal_workers() -> None:
    worker, kv = cases.model(10), cases.kv_of()
    cluster = Cluster(
        [PrefillWorker(worker, kv, 64, 8, 64) for _ in range(3)],
        [DecodeWorker(worker, kv, 8, 64) for _ in range(3)],
        [Link(1e300, 0.0)],
    )
    outcome = simulate(cluster, cases.load_of([(1, 4, 1)] * 9), RATE)
    assert [use.steps for use in outcome.decodes] == [outcome.decodes[0].steps] * 3
    assert all(use.steps for use in outcome.prefills)


def test_only_workers_of_one_layout_share_a_request() -> None:
    cluster = Cluster(
        [PrefillWorker(cases.model(1), cases.kv_of("a"), 64, 8, 64)],
        [DecodeWorker(cases.model(1), cases.kv_of(layout), 8, 64) for layout in ("b", "a")],
        [Link(1e300, 0.0)],
    )
    outcome = simulate(cluster, cases.load_of([(1, 4, 3)] * 5), RATE)
    assert outcome.decodes[0].steps == 0
    assert outcome.served.all()


def test_what_the_router_refuses_has_no_times() -> None:
    cluster = cases.alone(cases.model(10))
    narrow = Cluster([], cluster.decodes, router=Router(-1, requests_max=1))
    outcome = simulate(narrow, cases.load_of([(0, 4, 3), (1, 4, 3), (100, 4, 3)]), RATE)
    assert outcome.served.tolist() == [True, False, True]
    assert np.isinf([outcome.ttft_ms[1], outcome.tpot_ms[1], outcome.gap_max_ms[1], outcome.e2e_ms[1]]).all()
    assert len(outcome.gaps_ms()) == 6


@given(load=cases.loads(), model=st.builds(cases.model, *(st.integers(1, 3).map(float) for _ in range(3))))
def test_without_tokens_to_decode_beside_it_a_colocated_worker_prefills_as_a_prefill_worker_does(
    load: Traffic, model: object
) -> None:
    """Requests so far apart that nothing else decodes: the first token comes at the same time."""
    far = workload(load.prompts, load.outputs, np.full(len(load), 1e4))
    together = simulate(cases.alone(model, step_tokens=8), far, RATE)  # type: ignore[arg-type]
    apart = simulate(cases.pair_of(model, model, step_tokens=8), far, RATE)  # type: ignore[arg-type]
    np.testing.assert_allclose(together.ttft_ms, apart.ttft_ms)


@given(rows=st.integers(1, 7), prompt=st.integers(1, 20))
def test_a_token_takes_longer_in_a_larger_batch_and_behind_a_longer_context(rows: int, prompt: int) -> None:
    # all prompts in one step, so that all sequences begin together
    cluster = cases.pair_of(cases.model(1), cases.model(1, row=1, context=0.5), step_tokens=256, slots=64)

    def tpot_ms(sequences: int, tokens: int) -> float:
        return float(simulate(cluster, cases.load_of([(0.0, tokens, 5)] * sequences), RATE).tpot_ms[0])

    assert tpot_ms(rows, prompt) < tpot_ms(rows + 1, prompt)
    assert tpot_ms(rows, prompt) < tpot_ms(rows, prompt + 1)


@pytest.mark.parametrize("slower", [2.0, 4.0])
def test_a_scaled_clock_scales_all_times(slower: float) -> None:
    load = draw("humaneval", "poisson", 60, seed=3)

    def run(scale: float) -> Outcome:
        kv = Kv(128, 1 << 20, 1 << 20)
        prefill = PrefillWorker(cases.model(4 * scale, token=0.25 * scale), kv, 256, 8, 40)
        decode = DecodeWorker(cases.model(8 * scale, row=scale, context=scale / 64), kv, 8, 40)
        return simulate(Cluster([prefill], [decode], [Link(1e9 / scale, 2.0 * scale)]), load, 8.0 / scale)

    fast, slow = run(1.0), run(slower)
    np.testing.assert_allclose(slow.ttft_ms, fast.ttft_ms * slower)
    np.testing.assert_allclose(slow.all_gaps_ms, fast.all_gaps_ms * slower)


def test_quantiles_of_gaps_are_of_the_gaps_themselves() -> None:
    load = traffic(draw("humaneval", "poisson", 40, seed=1), classes=np.arange(40) % 2)
    outcome = simulate(cases.pair_of(cases.model(3, token=1), cases.model(2, row=1), slots=4), load, 20.0)
    ends = np.cumsum(load.outputs)
    own = [outcome.all_gaps_ms[end - count : end] for end, count in zip(ends, load.outputs, strict=True)]
    np.testing.assert_array_equal(outcome.gap_quantiles_ms([0.5, 0.99]), np.quantile(np.concatenate(own), [0.5, 0.99]))
    np.testing.assert_array_equal(outcome.gap_quantiles_ms(0.9, of=1), np.quantile(np.concatenate(own[1::2]), 0.9))
    np.testing.assert_array_equal(outcome.gap_max_ms, [gaps.max() for gaps in own])
    np.testing.assert_allclose(outcome.tpot_ms, [gaps.mean() for gaps in own])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefill_blocks": 1}, "prompt of 9 tokens needs 2 KV blocks, prefill worker 0 has 1"),
        ({"decode_blocks": 2}, "sequence of 12 tokens needs 3 KV blocks, decode worker 0 has 2"),
    ],
)
def test_a_request_that_fits_nowhere_is_told_with_the_limit(change: dict[str, int], words: str) -> None:
    cluster = cases.pair_of(cases.model(), cases.model(), **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=words):
        simulate(cluster, cases.load_of([(0, 9, 3)]), RATE)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(InvalidRequestError, match="rate of"):
        simulate(cases.alone(cases.model()), cases.load_of([(0, 1, 1)]), rate)


def test_clusters_that_serve_nothing() -> None:
    kv, model = cases.kv_of("a"), cases.model()
    prefill, decode = PrefillWorker(model, kv, 64, 8, 64), DecodeWorker(model, kv, 8, 64)
    link = Link(1e9, 0.0)
    for words, parts in (
        ("without decode workers", ([prefill], [], [link])),
        ("there is no link", ([prefill], [decode])),
        ("wires must say", ([prefill], [decode], [link, link])),
        ("wires must be 1 rows of 1", ([prefill], [decode], [link], [[0, 0]])),
        ("link 3 of 1", ([prefill], [decode], [link], [[3]])),
        ("no decode worker reads layout 'a'", ([prefill], [DecodeWorker(model, cases.kv_of("b"), 8, 64)], [link])),
        ("layout 'a' is both", ([prefill], [DecodeWorker(model, Kv(8, 8, 4, "a"), 8, 64)], [link])),
        ("decode worker 0 has slots 0, it must be at least 1", ([], [DecodeWorker(model, kv, 0, 64)])),
        ("has slowdown_max 1, it must be above 1", ([], [DecodeWorker(model, kv, 8, 64, slowdown_max=1.0)])),
        ("bytes_per_s 0, it must be above 0", ([prefill], [decode], [Link(0.0, 0.0)])),
        ("constant_ms -1, it must be at least 0", ([], [DecodeWorker(cases.model(-1), kv, 8, 64)])),
        ("row_slopes -1, it must be at least 0", ([], [DecodeWorker(cases.model(row=-1), kv, 8, 64)])),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            Cluster(*parts)


def test_requests_that_no_router_lets_in_or_sends_anywhere() -> None:
    cluster = cases.alone(cases.model())
    load = cases.load_of([(0, 9, 3)])
    with pytest.raises(InvalidRequestError, match="request of 13 tokens, the router admits at most 12"):
        simulate(Cluster([], cluster.decodes, router=Router(-1, tokens_max=12)), load, RATE)
    with pytest.raises(InvalidRequestError, match="prompt of 9 tokens needs a prefill worker, and there is none"):
        simulate(Cluster([], cluster.decodes, router=Router(8)), load, RATE)


def test_what_cannot_be_cached() -> None:
    cluster, load = cases.alone(cases.model()), cases.load_of([(0, 9, 3)])
    with pytest.raises(InvalidRequestError, match="9 tokens of request 0 are cached, at most 8 can be"):
        simulate(cluster, traffic(load, cached=[9, 0]), RATE)
    with pytest.raises(InvalidRequestError, match="cached has 3 numbers for 2 requests"):
        traffic(load, cached=[1, 2, 3])
    with pytest.raises(InvalidRequestError, match="classes has a number that is negative or not whole"):
        traffic(load, classes=-1)
