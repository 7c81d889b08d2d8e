"""Routing: only pairs that can serve, the least busy first, turns among equals."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from zipserve.router.policy import (
    InFlight,
    Need,
    Pair,
    PrefillScore,
    Worker,
    WorkerKey,
    choose,
    choose_alone,
    first_token_s_at_least,
    missing,
    prefill_scores,
)

NEED = Need("m", "r1", tokens=100)


def worker(name: str, **facts: object) -> Worker:
    values: dict[str, object] = {
        "worker_id": name,
        "incarnation": 1,
        "address": f"{name}:1",
        "model": "m",
        "revision": "r1",
        "context_tokens": 1000,
        "readable_layouts": frozenset({b"A"}),
        "writable_layout": b"A",
    }
    return Worker(**{**values, **facts})  # type: ignore[arg-type]  # the fields are those of Worker


LAYOUTS = st.sampled_from([b"A", b"B", b""])


@st.composite
def fleets(draw: st.DrawFn) -> list[Worker]:
    return [
        worker(
            f"w{i}",
            incarnation=draw(st.integers(1, 2)),
            model=draw(st.sampled_from(["m", "m", "other"])),
            revision=draw(st.sampled_from(["r1", "r1", "r2"])),
            context_tokens=draw(st.sampled_from([50, 1000])),
            readable_layouts=draw(st.frozensets(LAYOUTS, max_size=2)),
            writable_layout=draw(LAYOUTS),
            queued_tokens=draw(st.integers(0, 3)),
            running_requests=draw(st.integers(0, 3)),
            free_blocks=draw(st.integers(0, 2)),
        )
        for i in range(draw(st.integers(0, 5)))
    ]


def usable(pair: Pair) -> bool:
    able = all(w.model == "m" and w.revision == "r1" and w.context_tokens >= 100 for w in (pair.prefill, pair.decode))
    return able and pair.prefill.writable_layout != b"" and pair.prefill.writable_layout in pair.decode.readable_layouts


@given(fleets(), fleets(), st.data())
def test_picks_a_usable_pair_if_there_is_one(
    prefills: list[Worker], decodes: list[Worker], data: st.DataObject
) -> None:
    failed: list[WorkerKey] = data.draw(st.lists(st.sampled_from([w.key for w in prefills + decodes] or [("x", 1)])))
    pairs = [pair for p in prefills for d in decodes if usable(pair := Pair(p, d))]
    best = choose(prefills, decodes, NEED, InFlight(), failed)
    if best is None:
        assert pairs == []
        assert missing(prefills, decodes, NEED)
        return
    assert best in pairs

    def failures(of: Pair) -> int:
        return (of.prefill.key in failed) + (of.decode.key in failed)

    assert failures(best) == min(map(failures, pairs))
    if not failed:
        assert best.prefill.queued_tokens == min(pair.prefill.queued_tokens for pair in pairs)
        readers = [pair.decode for pair in pairs if pair.prefill == best.prefill]
        assert best.decode.running_requests == min(w.running_requests for w in readers)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_equal_workers_get_equal_shares(prefills: int, decodes: int, requests: int, random: object) -> None:
    """Whether the requests run together, one after the other, or anything between."""
    fleet = [worker(f"p{i}") for i in range(prefills)], [worker(f"d{i}") for i in range(decodes)]
    in_flight = InFlight()
    running: list[ExitStack] = []
    share: Counter[str] = Counter({w.worker_id: 0 for w in [*fleet[0], *fleet[1]]})
    for _ in range(requests):
        pair = choose(*fleet, NEED, in_flight)
        assert pair is not None
        share.update([pair.prefill.worker_id, pair.decode.worker_id])
        in_flight.picked(pair)
        running.append(ExitStack())
        running[-1].enter_context(in_flight.prefilling(pair.prefill, 10))
        running[-1].enter_context(in_flight.decoding(pair.decode))
        # the oldest end first, so that ends do not unbalance what is running
        while running and random.random() < 0.4:  # type: ignore[attr-defined]
            running.pop(0).close()
    for prefix in "pd":
        counts = [count for name, count in share.items() if name[0] == prefix]
        assert max(counts) - min(counts) <= 1
    for stack in running:
        stack.close()
    assert not in_flight.prefill_tokens
    assert not in_flight.decode_requests


def test_ties_go_to_the_smallest_id() -> None:
    pair = choose([worker("p2"), worker("p1")], [worker("d3"), worker("d1"), worker("d2")], NEED, InFlight())
    assert pair is not None
    assert (pair.prefill.worker_id, pair.decode.worker_id) == ("p1", "d1")


def test_own_requests_count_before_the_next_heartbeat() -> None:
    in_flight = InFlight()
    busy, idle = worker("p1"), worker("p2", queued_tokens=50)
    with in_flight.prefilling(busy, 51):
        pair = choose([busy, idle], [worker("d1")], NEED, in_flight)
        assert pair is not None
        assert pair.prefill is idle
    pair = choose([busy, idle], [worker("d1")], NEED, in_flight)
    assert pair is not None
    assert pair.prefill is busy


def test_a_cached_prefix_is_worth_the_tokens_that_it_saves() -> None:
    cold, warm, decodes = worker("p1"), worker("p2", queued_tokens=700), [worker("d1")]
    for saved, best in ((699, cold), (701, warm)):
        pair = choose([cold, warm], decodes, NEED, InFlight(), (), {cold.key: 1000, warm.key: 1000 - saved})
        assert pair is not None
        assert pair.prefill is best


def test_scores_explain_the_choice() -> None:
    in_flight = InFlight()
    prefills = [worker("p1", queued_tokens=9), worker("p2")]
    with in_flight.prefilling(prefills[1], 5):
        scores = prefill_scores(prefills, in_flight, {("p1", 1)}, {("p1", 1): 100, ("p2", 1): 20})
    assert scores == [PrefillScore(1, 109, 0, "p1"), PrefillScore(0, 25, 0, "p2")]


def test_decode_prefers_free_blocks_among_equally_busy() -> None:
    decodes = [
        worker("d1", free_blocks=3),
        worker("d2", free_blocks=9),
        worker("d3", free_blocks=99, queued_requests=1),
    ]
    pair = choose([worker("p1")], decodes, NEED, InFlight())
    assert pair is not None
    assert pair.decode.worker_id == "d2"


def test_a_failed_worker_serves_when_nothing_else_is_left() -> None:
    prefills, decodes = [worker("p1"), worker("p2")], [worker("d1")]
    pair = choose(prefills, decodes, NEED, InFlight(), failed={("p1", 1), ("d1", 1)})
    assert pair is not None
    assert (pair.prefill.worker_id, pair.decode.worker_id) == ("p2", "d1")


def test_a_restarted_worker_has_not_failed() -> None:
    prefills = [worker("p1", incarnation=2), worker("p2")]
    pair = choose(prefills, [worker("d1")], NEED, InFlight(), failed={("p1", 1)})
    assert pair is not None
    assert pair.prefill.worker_id == "p1"


def test_mixed_layouts_during_an_upgrade() -> None:
    old, new = worker("p1", writable_layout=b"A"), worker("p2", writable_layout=b"B", queued_tokens=9)
    reads_new = worker("d1", readable_layouts=frozenset({b"B"}))
    pair = choose([old, new], [reads_new], NEED, InFlight())
    assert pair is not None
    assert pair.prefill is new


def test_missing_names_what_is_missing() -> None:
    p, d = worker("p1", layout_description="zip 4/32"), worker("d1")
    assert missing([], [d], NEED) == "no prefill worker is alive"
    assert missing([p], [], NEED) == "no decode worker is alive"
    assert "they serve m@r2" in missing([p], [worker("d1", revision="r2")], NEED)
    assert "takes 100 tokens, the longest context is 50" in missing([worker("p1", context_tokens=50)], [d], NEED)
    assert "zip 4/32" in missing([p], [worker("d1", readable_layouts=frozenset({b"B"}))], NEED)


def test_a_decode_worker_alone() -> None:
    decodes = [worker("d1", running_requests=1), worker("d2", parked_requests=2), worker("d3", context_tokens=50)]
    route = choose_alone(decodes, NEED, InFlight())
    assert route is not None
    assert route.decode.worker_id == "d1"
    assert route.workers == (route.decode,)
    failed = choose_alone(decodes, NEED, InFlight(), failed={("d1", 1)})
    assert failed is not None
    assert failed.decode.worker_id == "d2"
    assert choose_alone(decodes[2:], NEED, InFlight()) is None
    assert missing(None, decodes[2:], NEED) == "no decode worker takes 100 tokens, the longest context is 50"


def test_the_first_token_takes_what_is_ahead_at_half_the_measured_time() -> None:
    in_flight, fast, slow = InFlight(), worker("fast", prefill_tokens_per_s=100.0), worker("slow")
    slow = replace(slow, prefill_tokens_per_s=10.0, queued_tokens=10_000)

    def seconds(*workers: Worker, priority: int = 0, tokens: int = 50) -> float:
        return first_token_s_at_least(workers, NEED, in_flight, priority, {w.key: tokens for w in workers})

    assert seconds(fast) == 0.25
    assert seconds(slow, fast) == 0.25, "the fastest counts"
    assert seconds(slow) == 2.5, "what others have sent there may be of any priority"
    with in_flight.prefilling(slow, 50, priority=0), in_flight.prefilling(slow, 500, priority=0):
        assert seconds(slow) == 5.0, "a longer one may be overtaken"
        assert seconds(slow, tokens=500) == (50 + 500 + 500) / 20
        assert seconds(slow, priority=1) == 2.5
        assert seconds(slow, priority=-1) == 30.0
        assert seconds(replace(slow, queued_tokens=20)) == 3.5, "what it has begun is nearly done"
    assert seconds(slow) == 2.5
    assert in_flight == InFlight()
    assert seconds(slow, worker("silent")) == 0.0
    assert seconds(worker("other", model="other", prefill_tokens_per_s=1.0)) == 0.0
