"""Placement of our own workers: what can be built, bounds over it, the search, and what is made of the answer."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from worker_profiles import profile_of
from zipserve.common.errors import InvalidRequestError
from zipserve.planner.__main__ import main
from zipserve.planner.native.goodput import drawn, passes
from zipserve.planner.native.objectives import Objective, Slo
from zipserve.planner.native.profile import Link, WorkerProfile, save
from zipserve.planner.native.traffic import Traffic, traffic
from zipserve.planner.placement.candidate import APART, TOGETHER, Candidate, Group, Settings, candidates
from zipserve.planner.placement.ceiling import ceiling
from zipserve.planner.placement.fleet import Fleet, taken_by
from zipserve.planner.placement.router_log import Logged, read_log
from zipserve.planner.placement.search import Question, Ranking, search
from zipserve.planner.placement.values import values
from zipserve.planner.placement.watch import LOOKS, News, Watch
from zipserve.planner.workload import workload

SLO = Slo(Objective(ttft_ms=1_500.0, tpot_ms=60.0, share=0.9))


def load_of(requests: int = 60, prompt: int = 200, output: int = 20, seed: int = 0) -> Traffic:
    random = np.random.default_rng(seed)
    prompts = random.integers(prompt // 2, 2 * prompt, requests)
    outputs = random.integers(max(output // 2, 1), 2 * output, requests)
    gaps = random.exponential(1.0, requests)
    return traffic(workload(prompts, outputs, gaps))


def question(*profiles: WorkerProfile, devices: int = 3, **changes: Any) -> Question:
    names = {taken_by(profile)[0] for profile in profiles}
    fleet = Fleet(dict.fromkeys(names, devices))
    return replace(Question(profiles, fleet, load_of(), SLO, rate_max=100.0, seeds=range(2)), **changes)


def test_all_that_a_fleet_has_room_for() -> None:
    built, refused = candidates([profile_of()], Fleet({"gpu": 3}))
    assert {(one.arrangement, one.shape) for one in built} == {
        (TOGETHER, (0, 1)), (TOGETHER, (0, 2)), (TOGETHER, (0, 3)),
        (APART, (1, 1)), (APART, (1, 2)), (APART, (2, 1)),
    }  # fmt: skip
    assert not refused


def test_cpus_are_counted_in_cores() -> None:
    built, _ = candidates([profile_of(device="cpu-2", threads=2)], Fleet({"cpu": 5}))
    assert {one.shape for one in built if one.arrangement == TOGETHER} == {(0, 1), (0, 2)}
    assert {one.taken["cpu"] for one in built} == {2, 4}


def test_layouts_have_to_be_the_same() -> None:
    built, _ = candidates([profile_of(), profile_of(codec="raw")], Fleet({"gpu": 2}))
    apart = [one for one in built if one.prefill is not None]
    assert len(apart) == 2
    assert all(one.prefill.profile is one.decode.profile for one in apart if one.prefill)


def test_what_was_not_measured_is_not_used() -> None:
    no_mix, no_link = profile_of(terms=("rows", "context")), profile_of(link=None)
    built, refused = candidates([no_mix], Fleet({"gpu": 2}))
    assert not built
    assert {one.why.split("what ")[-1] for one in refused} == {
        "tokens, pairs cost a prefill worker", "tokens, pairs cost a decode worker",
    }  # fmt: skip
    built, _ = candidates([no_link], Fleet({"gpu": 2}))
    assert {one.arrangement for one in built} == {TOGETHER}
    _, refused = candidates([profile_of(device="big")], Fleet({"gpu": 2}))
    assert refused[0].why == "one worker takes 1 of big, there are 0"


def test_settings_beyond_what_was_measured() -> None:
    candidate = Candidate(None, Group(profile_of(step_tokens=64), 1, Settings(step_tokens=65)))
    with pytest.raises(InvalidRequestError, match="step_tokens of 65: workers were measured with at most 64"):
        _ = candidate.cluster
    smaller = Candidate(None, Group(profile_of(), 2, Settings(step_tokens=32, slots=4))).cluster
    assert [(worker.step_tokens, worker.slots) for worker in smaller.decodes] == [(32, 4)] * 2


numbers = st.floats(0.1, 20.0)
objectives = st.builds(
    Objective,
    ttft_ms=st.sampled_from([200.0, 1_000.0, math.inf]),
    tpot_ms=st.sampled_from([30.0, 200.0]),
    e2e_ms=st.sampled_from([2_000.0, math.inf]),
    share=st.sampled_from([0.5, 0.9, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    profile=st.builds(
        profile_of,
        constant_ms=numbers,
        token_ms=st.floats(0.01, 2.0),
        row_ms=numbers,
        step_tokens=st.sampled_from([1, 3, 32, 256]),
        slots=st.integers(1, 16),
    ),
    shape=st.tuples(st.integers(0, 2), st.integers(1, 2)),
    slo=st.lists(objectives, min_size=1, max_size=2).map(lambda some: Slo(*some)),
    seed=st.integers(0, 3),
    cached=st.sampled_from([0.0, 0.5]),
    arrivals=st.sampled_from(["poisson", "gamma", "replay"]),
)
def test_nothing_passes_above_its_ceiling(
    profile: WorkerProfile, shape: tuple[int, int], slo: Slo, seed: int, cached: float, arrivals: str
) -> None:
    prefill = Group(profile, shape[0]) if shape[0] else None
    candidate = Candidate(prefill, Group(profile, shape[1]))
    load = load_of(40, 100, 10)
    load = drawn(traffic(load, np.floor(cached * load.prompts)), seed, 4, arrivals)
    most = ceiling(candidate, load, slo)
    assume(most < math.inf)
    assert not any(passes(candidate.cluster, load, most * factor, slo) for factor in (1.0001, 1.1, 1.5, 3.0, 20.0))


def test_one_request_has_no_ceiling() -> None:
    one = load_of(60).first(1)
    assert ceiling(Candidate(None, Group(profile_of(), 1)), one, SLO) == math.inf
    assert search(question(profile_of(), devices=1, traffic=one)).best() is not None


def test_prices_do_not_bound_the_rate() -> None:
    asked = question(profile_of(), devices=1, rate_max=1e-3)
    cheap = replace(asked, fleet=Fleet({"gpu": 1}, {"gpu": 0.01}))
    rates = [best.rate for best in (search(asked).best(), search(cheap).best()) if best is not None]
    assert rates[0] == rates[1] > 1


@pytest.mark.parametrize("rate", [None, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("prices", [{}, {"gpu": 3.0, "cheap": 1.0}])
def test_pruning_loses_no_winner(rate: float | None, prices: dict[str, float]) -> None:
    profiles = [profile_of(), profile_of(device="cheap", token_ms=3.0, row_ms=5.0), profile_of(codec="raw")]
    asked = question(*profiles, devices=3, rate=rate)
    asked = replace(asked, fleet=Fleet(asked.fleet.counts, prices if set(prices) <= set(asked.fleet.counts) else {}))
    pruned, whole = search(asked), search(replace(asked, prune=False))
    assert sum(one.goodput is None for one in pruned.found) > sum(one.goodput is None for one in whole.found) == 0
    assert _key(pruned) == _key(whole)
    if rate is None:
        for arrangement in (APART, TOGETHER):
            assert _key(pruned, arrangement) == _key(whole, arrangement)


def _key(ranking: Ranking, arrangement: str | None = None) -> tuple[str, float] | None:
    best = ranking.best(arrangement)
    return None if best is None else (str(best.candidate), best.rate)


def test_apart_where_prompts_would_hold_up_tokens() -> None:
    """With a tight limit on gaps, prompts beside them cost more than a device of their own."""
    load = load_of(80, 600, 60)
    tight = Slo(Objective(ttft_ms=4_000.0, gap_ms=15.0, share=0.9))
    fast = profile_of(constant_ms=10.0, token_ms=0.5, row_ms=0.5)
    best = search(question(fast, devices=2, traffic=load, slo=tight)).best()
    assert best is not None
    assert best.candidate.arrangement == APART
    # with answers of few tokens a device for decoding would stand idle
    loose = Slo(Objective(ttft_ms=4_000.0, tpot_ms=200.0, share=0.9))
    best = search(question(fast, devices=2, traffic=load_of(80, 600, 2), slo=loose)).best()
    assert best is not None
    assert best.candidate.arrangement == TOGETHER


def test_as_little_as_serves_the_rate() -> None:
    asked = question(profile_of(), devices=4)
    whole = search(replace(asked, prune=False))
    one = max(found.rate for found in whole.found if found.cost == 1)
    most = max(found.rate for found in whole.found)
    for rate, served in ((0.99 * one, True), (1.01 * one, True), (1.01 * most, False)):
        found = search(replace(asked, rate=rate)).best()
        assert found is not None
        assert (found.rate >= rate) is served
        if served:
            assert found.cost == min(each.cost for each in whole.found if each.rate >= rate)
        else:
            assert found.rate == most


def test_nothing_keeps_the_limits() -> None:
    slo = Slo(Objective(ttft_ms=5.0, share=0.9))
    with pytest.raises(InvalidRequestError, match="with nothing else running 90 % of the requests have a TTFT of"):
        search(question(profile_of(), slo=slo))
    with pytest.raises(InvalidRequestError, match="needs 3 KV blocks"):
        search(question(profile_of(blocks=2), traffic=load_of(prompt=250)))


def test_values_for_the_chart() -> None:
    pair = Candidate(Group(profile_of(), 2, Settings(step_tokens=128)), Group(profile_of(), 3))
    found = values(pair)
    assert found["prefill"]["groups"]["planned"]["replicas"] == 2
    assert found["prefill"]["groups"]["planned"]["settings"]["step_tokens"] == 128
    assert found["decode"]["groups"]["planned"]["settings"]["sequences_max"] == 16
    assert found["router"]["settings"] == {"local_prefill_tokens_max": 0}
    alone = values(Candidate(None, Group(profile_of(), 3)))
    assert (alone["prefill"]["replicas"], alone["router"]["settings"]["local_prefill_tokens_max"]) == (0, -1)


def log_line(at: str, **changes: Any) -> bytes:
    told = {
        "event": "request.finished", "timestamp": at, "seconds": 2.0, "outcome": "OK", "prompt_tokens": 100,
        "completion_tokens": 20, "choices": 1, "cached_tokens": 0,
    }  # fmt: skip
    return json.dumps(told | changes).encode() + b"\n"


def test_a_routers_log(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    path.write_bytes(
        b"not JSON, nor UTF-8: \xff\n"
        + log_line("2026-11-01T12:00:04Z", seconds=1.0, cached_tokens=64)
        + log_line("2026-11-01T12:00:02Z", choices=2, completion_tokens=42)
        + log_line("2026-11-01T12:00:09Z", prompt_tokens=7)
    )
    found, rate = read_log(path).traffic, read_log(path).rate
    assert rate == pytest.approx(1 / 3.5)
    assert found.prompts.tolist() == [100, 100, 7]
    assert found.outputs.tolist() == [20, 19, 19]
    assert found.cached.tolist() == [0, 64, 0]
    assert found.unit_gaps.tolist() == pytest.approx([0.0, 3 / 3.5, 4 / 3.5])
    assert read_log(path, 2).traffic.prompts.tolist() == [100, 7]
    for broken, requests, message in (
        (b"", None, "tells of 0 requests, 0 of them answered"),
        (log_line("2026-11-01T12:00:04Z", outcome="OVERLOADED") * 2, None, "tells of 2 requests, 0 of them answered"),
        (log_line("2026-11-01T12:00:04Z") * 2, None, "all its requests came at once"),
        (log_line("2026-11-01T12:00:04Z") * 2, 1, "1 requests of a log are too few"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InvalidRequestError, match=message):
            read_log(path, requests)


def test_what_was_refused_came_as_well(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    outcomes = ["OK", "OVERLOADED", "OK", "CANCELLED", "OK"]
    path.write_bytes(b"".join(log_line(f"2026-11-01T12:00:0{i}Z", outcome=each) for i, each in enumerate(outcomes)))
    found = read_log(path)
    assert found.rate == pytest.approx(1.0)
    assert found.traffic.prompts.tolist() == [100] * 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    save(profile_of(measured=False), folder / "gpu.json")
    files = {"--values": tmp_path / "values.yaml", "--report": tmp_path / "plan.html"}
    asked = [
        "--profile", str(folder), "--devices", "gpu:2", "--distribution", "fixed:200,20", "--requests", "60",
        "--slo-ttft", "2000", "--slo-tpot", "80", "--slo-gap", "400", "--seeds", "2", "--price", "gpu=2.5",
    ]  # fmt: skip
    assert main([*asked, *(str(part) for item in files.items() for part in item)]) == 0
    words = capsys.readouterr().out
    assert "nobody has measured gpu" in words
    found = yaml.safe_load(files["--values"].read_text())
    assert set(found) == {"prefill", "decode", "router"}
    assert "data:image/png;base64," in files["--report"].read_text()
    assert main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["best"]["goodput"] == pytest.approx(np.mean(answer["best"]["goodput_by_seed"]))
    assert answer["best"]["cost"] in (2.5, 5.0)
    assert len(answer["curves"][0]["attained"][0]) == len(answer["curves"][0]["rates"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--devices", "tpu:2"], "one worker takes 1 of gpu, there are 0"),
        (["--devices", "gpu:0"], "0 devices of gpu are none"),
        (["--price", "gpu=free"], "not of the form NAME=NUMBER"),
        (["--price", "tpu=1"], "a price for tpu, of which there are no devices"),
        (["--slo-ttft", "0"], "the limit on TTFT is 0 ms"),
        (["--seeds", "0"], r"--seeds 0 is not in \[1, 100\]"),
        (["--report", "plan.txt"], "must end with .png or .html"),
        (["--slots", "99"], "slots of 99: workers were measured with at most 16"),
        (["--slo-gap", "nan"], "the limit on GAP is nan ms"),
        (["--model", "another"], "the profiles are of a-model, not of another"),
        (["--search", "pairs"], "--search is for published profiles"),
        (["--values", "/nowhere/values.yaml"], "--values /nowhere/values.yaml cannot be written"),
    ],
)
def test_bad_options(changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(profile_of(link=Link(1e9, 2.0)), tmp_path / "gpu.json")
    asked = {
        "--profile": str(tmp_path / "gpu.json"), "--devices": "gpu:2", "--distribution": "fixed:200,20",
        "--requests": "20", "--slo-ttft": "2000", "--slo-tpot": "80",
    }  # fmt: skip
    asked |= {changes[0]: changes[1]}
    assert main([part for item in asked.items() for part in item]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_shift_is_believed_when_it_stays() -> None:
    asked = question(profile_of(), devices=4, traffic=load_of(300))
    one = max(found.rate for found in search(replace(asked, prune=False)).found if found.cost == 1)
    rate = 0.6 * one
    asked = replace(asked, rate=1.2 * rate)
    watch = Watch(asked, search(asked), rate, 1.2)
    same = Logged(load_of(300, seed=1), 1.1 * rate)
    more = Logged(load_of(300, prompt=400, seed=2), 2.0 * rate)
    assert watch.look(same) == News(())
    for _ in range(LOOKS - 1):
        news = watch.look(more)
        assert ["prompts of" in shift for shift in news.shifts] == [True, False]
        assert not news.replan
    assert watch.look(same) == News(())
    news = [watch.look(more) for _ in range(LOOKS)][-1]
    assert "-      replicas: 1\n" in news.replan
    assert watch.look(more) == News(()), "what was planned for is no news"


def test_a_plan_that_still_serves_is_kept() -> None:
    """A shift that changes nothing that matters costs nothing."""
    asked = question(profile_of(), devices=4, traffic=load_of(300))
    one = max(found.rate for found in search(replace(asked, prune=False)).found if found.cost == 1)
    asked = replace(asked, rate=0.5 * one)
    watch = Watch(asked, search(asked), 0.4 * one, 1.2)
    news = [watch.look(Logged(load_of(300, prompt=60), 0.3 * one)) for _ in range(LOOKS)][-1]
    assert len(news.shifts) == 2
    assert not news.replan
