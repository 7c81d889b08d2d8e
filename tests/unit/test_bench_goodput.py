"""`zipserve bench goodput`: workloads with the means that they promise, the search for a goodput that scatters,
arrangements, tables, and bars."""

import itertools
import json
import math
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.bench.goodput import bars, command, plot, runs, table
from zipserve.bench.goodput.arrangements import Arrangement, parse, read_plan
from zipserve.bench.goodput.contestants import Connect
from zipserve.bench.goodput.runs import Load, Run
from zipserve.bench.goodput.search import Goodput, Point, Search, fitted, goodput
from zipserve.bench.goodput.workloads import MIXES, Lengths, Mix, Trace, named
from zipserve.bench.serve.arrivals import Arrival
from zipserve.bench.serve.endpoints import Ask, Prompt
from zipserve.bench.serve.records import Objective, Record
from zipserve.common.errors import InvalidRequestError

OBJECTIVE = Objective(ttft_s=4.0, tpot_s=0.2, gap_s=0.35)


@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
def test_few_requests_have_the_means_of_their_workload(mix: Mix) -> None:
    for seed in ("1, 0", "2, 0"):
        due = mix.arrivals(48, 0.5, seed)
        assert statistics.mean(a.prompt_tokens for a in due) == pytest.approx(mix.prompt.mean, rel=0.03)
        assert statistics.mean(a.output_tokens for a in due) == pytest.approx(mix.output.mean, rel=0.03)
        assert max(a.prompt_tokens + a.output_tokens for a in due) <= 1024
    assert mix.arrivals(48, 0.5, "1, 0") != mix.arrivals(48, 0.5, "2, 0")


@given(st.floats(0.15, 0.6), st.floats(0.3, 1.0), st.integers(8, 200), st.integers(3, 12))
def test_bounded_lengths(where: float, sigma: float, low: int, times: int) -> None:
    high = low * times
    lengths = Lengths(low + where * (high - low), sigma, low, high)
    drawn = lengths.draw(500, random.Random(1))
    assert low <= min(drawn) <= max(drawn) <= high
    assert statistics.mean(drawn) == pytest.approx(lengths.mean, rel=0.02)


def test_rates_differ_in_nothing_else() -> None:
    slow, fast = (MIXES["rival"].arrivals(200, rate, "1") for rate in (0.5, 2.0))
    assert [(a.prompt_tokens, a.output_tokens) for a in slow] == [(a.prompt_tokens, a.output_tokens) for a in fast]
    assert [a.at_s for a in slow] == pytest.approx([a.at_s * 4 for a in fast])
    assert slow == sorted(slow, key=lambda arrival: arrival.at_s)
    assert 0.97 * 400 < slow[-1].at_s <= 400
    gaps = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(slow)]
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(1.0, abs=0.15)  # Poisson's


def test_traces_at_any_rate(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n10,3,4\n11,5,6\n14,7,8\n")
    trace = named(str(path))
    assert trace.name == "t.csv"
    assert trace.arrivals(3, 1.0, "") == [Arrival(0.0, 3, 4), Arrival(0.5, 5, 6), Arrival(2.0, 7, 8)]
    assert trace.arrivals(2, 2.0, "") == [Arrival(0.0, 3, 4), Arrival(0.5, 5, 6)]  # what comes later is not sent
    with pytest.raises(InvalidRequestError, match=r"t\.csv: its first 1 requests have no rate"):
        trace.arrivals(1, 1.0, "")
    with pytest.raises(InvalidRequestError, match=r"t\.csv has 3 requests, not 4"):
        trace.arrivals(4, 1.0, "")
    path.write_text("arrival_s,prompt_tokens,output_tokens\n1,3,4\n1,5,6\n")
    with pytest.raises(InvalidRequestError, match="2 requests at one time have no rate"):
        Trace.read(path)
    with pytest.raises(InvalidRequestError, match="'chatt' is no file and none of rival, chat"):
        named("chatt")


def test_every_run_has_prompts_that_were_never_seen() -> None:
    load = Load(MIXES["rival"], requests=6, edge=1, vocab_tokens=800, seed=1)
    sent = [load.run(rate, repeat) for rate, repeat in ((0.5, 0), (0.5, 1), (0.6, 0))]
    assert [len(due) for due, _ in sent] == [8, 8, 8]
    assert len({tuple(prompt[:16]) for _, prompts in sent for prompt in prompts}) == 24
    assert load.run(0.5, 0) == sent[0]  # the same for every arrangement


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 20), st.integers(1, 20)), min_size=1))
def test_fitted_shares_never_rise(found: list[tuple[int, int, int]]) -> None:
    points = [Point(rate / 2, min(kept, requests), requests) for rate, kept, requests in found]
    shares = fitted(points)
    assert [point.rate for point in shares] == sorted({point.rate for point in points})
    assert all(later.share <= earlier.share + 1e-9 for earlier, later in itertools.pairwise(shares))
    assert sum(point.kept for point in shares) == pytest.approx(sum(point.kept for point in points))
    rates = sorted({point.rate for point in points})
    once = [Point(rate, 10 - index, 20) for index, rate in enumerate(rates)]
    assert fitted(once) == once


def test_goodput_of_some_rates() -> None:
    points = [Point(0.4, 40, 40), Point(0.5, 35, 40), Point(0.6, 38, 40), Point(0.7, 30, 40)]
    assert goodput(points, 0.9) == Goodput(0.6, 0.7)  # 35 and 38 of 40 are 91 % together
    assert goodput(points, 0.97) == Goodput(0.4, 0.5)
    assert goodput(points, 0.7) == Goodput(0.7, math.inf)
    assert goodput(points[3:], 0.9) == Goodput(0.0, 0.7)


@given(st.floats(0.11, 3.0))
def test_search_without_chance(limit: float) -> None:
    search = Search(0.9, 0.4, runs_max=20)
    while (following := search.next()) is not None:
        rate, repeat = following
        assert repeat == 0
        search.add(40 if rate <= limit else 0, 40)
    found = goodput(search.points, 0.9)
    assert found.rate <= limit < found.below
    assert found.below / found.rate == pytest.approx(1.1)
    assert found.most == found.rate
    assert len(search.points) <= 9


def test_search_where_no_rate_or_every_rate_will_do() -> None:
    none, every = Search(0.9, 0.4), Search(0.9, 0.4, runs_max=3)
    for search, kept in ((none, 0), (every, 40)):
        while search.next() is not None:
            search.add(kept, 40)
    assert [point.rate for point in none.points] == pytest.approx([0.4, 0.2, 0.1], rel=0.1)
    assert goodput(none.points, 0.9).rate == 0
    assert goodput(every.points, 0.9) == Goodput(every.points[-1].rate, math.inf)


@given(st.integers(0, 200), st.floats(0.2, 1.2))
def test_search_by_chance(seed: int, limit: float) -> None:
    """Shares fall smoothly through 90 % at the limit, 40 requests each: what is found lies close to it."""
    randomness, search = random.Random(seed), Search(0.9, 0.4, runs_max=12)
    while (following := search.next()) is not None:
        share = 1 / (1 + math.exp(math.log(following[0] / limit) * 12 - math.log(9)))
        search.add(sum(randomness.random() < share for _ in range(40)), 40)
    assert len(search.points) <= 12
    assert 0.7 * limit <= goodput(search.points, 0.9).rate <= 1.35 * limit


def test_a_doubtful_rate_is_measured_once_more() -> None:
    search = Search(0.9, 1.0, factor=2.0)
    search.add(40, 40)
    search.add(35, 40)  # 87.5 % at twice the rate
    assert search.next() == (2.0, 1)
    search.add(39, 40)  # 92.5 % in both
    assert search.next() == (4.0, 0)
    search.add(0, 40)
    assert search.next() is None
    assert goodput(search.points, 0.9) == Goodput(2.0, 4.0)


def test_arrangements() -> None:
    assert parse("replicas", 2) == Arrangement("replicas", 0, 2)
    assert parse("whole", 2) == Arrangement("whole", 0, 1, 2)
    apart = parse("apart:decode.step_tokens=64,codec=raw", 2)
    assert (apart.prefill, apart.decode, apart.devices) == (1, 1, 2)
    assert apart.up("m", "zip-4/32", 16) == [
        *("--prefill=1", "--decode=1", "--threads=1", "--model=m", "--codec=raw"),
        *("--set=prefill.sequences_max=16", "--set=decode.sequences_max=16", "--set=decode.step_tokens=64"),
    ]
    assert "--codec=int4" in parse("one:prefill=0,decode=1", 2).up("m", "int4", 16)
    own = parse("apart:decode.sequences_max=8", 2).up("m", "raw", 16)
    assert own[-2:] == ["--set=prefill.sequences_max=16", "--set=decode.sequences_max=8"]
    assert Arrangement("x", 1, 2, 2).cores([3, 4, 5, 6, 7, 8]) == {
        "prefill-0": [3, 4],
        "decode-0": [5, 6],
        "decode-1": [7, 8],
    }
    with pytest.raises(InvalidRequestError, match="x needs 6 cores, 2 are there"):
        Arrangement("x", 1, 2, 2).cores([0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("togther", "'togther' is none of replicas, whole, apart"),
        ("x:decode", "'decode' is not of the form FIELD=VALUE"),
        ("x:decode=1", "lacks prefill"),
        ("x:prefill=1,decode=0", "decode is 0, no whole number from 1 on"),
        ("x:prefill=1,decode=two", "decode is 'two', no whole number from 1 on"),
        ("apart:kodec=raw", "'kodec' is none of codec, decode, name, prefill, settings, threads"),
        ("apart:codec=zap", "codec is 'zap', none of"),
        ("apart:worker.threads=2", "settings is 'worker.threads', no SERVICE.FIELD"),
    ],
)
def test_no_arrangements(text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse(text, 2)


def test_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"prefill": 1, "decode": 1, "codec": "int8", "settings": {"decode.step_tokens": 64}}')
    assert read_plan(path) == Arrangement("planned", 1, 1, 1, "int8", (("decode.step_tokens", "64"),))
    for broken, message in (
        ("{", "is no JSON"),
        ("[]", "has no object"),
        ('{"prefill": 1}', "lacks decode"),
        ('{"prefill": true, "decode": 1}', "prefill is True"),
        ('{"prefill": 1, "decode": 1, "speed": 2}', "'speed' is none of"),
        ('{"prefill": 1, "decode": 1, "settings": 2}', "settings are no object"),
    ):
        path.write_text(broken)
        with pytest.raises(InvalidRequestError, match=message):
            read_plan(path)


def test_what_the_planner_prints(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    group = {"replicas": 2, "device": "cpu-1", "tensor": 1, "codec": "raw", "step_tokens": None, "slots": 8}
    both = {"arrangement": "together", "decode": {**group, "free_ms": 250.0}}
    path.write_text(json.dumps({"best": both, "candidates": []}))
    settings: tuple[tuple[str, str], ...] = (("decode.sequences_max", "8"), ("decode.step_free_s", "0.25"))
    assert read_plan(path) == Arrangement("planned", 0, 2, 1, "raw", settings)
    prefill = {**group, "replicas": 1, "step_tokens": 64}
    path.write_text(json.dumps({"best": {"prefill": prefill, "decode": group}}))
    settings = (("prefill.step_tokens", "64"), ("prefill.sequences_max", "8"), ("decode.sequences_max", "8"))
    assert read_plan(path) == Arrangement("planned", 1, 2, 1, "raw", settings)
    path.write_text(json.dumps({"best": {"prefill": {**prefill, "device": "cpu-2"}, "decode": group}}))
    with pytest.raises(InvalidRequestError, match="only workers of equally many cores each"):
        read_plan(path)


def a_record(ttft_s: float, *gaps_s: float, error: str = "") -> Record:
    at_s, arrivals = ttft_s, [(ttft_s, 1)]
    for gap_s in gaps_s:
        at_s += gap_s
        arrivals.append((at_s, 1))
    return Record(0.0, 10, 0.0, arrivals, at_s, error)


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (a_record(4.0, 0.35, 0.05), True),
        (a_record(4.1, 0.1), False),
        (a_record(1.0, 0.25, 0.25), False),  # slow
        (a_record(1.0, 0.05, 0.36, 0.05, 0.05), False),  # stalled, though its tokens are fast enough
        (a_record(1.0), True),  # a single token
        (a_record(1.0, 0.1, error="OVERLOADED"), False),
        (Record(0.0, 10), False),  # nothing came
    ],
)
def test_objectives(record: Record, kept: bool) -> None:
    assert OBJECTIVE.kept(record) == kept


def a_run(rate: float, *records: Record, edge: int = 0) -> Run:
    return Run(rate, 0, [Arrival(float(index), 10, 3) for index in range(len(records))], records, edge)


def test_what_a_run_comes_to() -> None:
    late, good = a_record(9.0, 0.1), a_record(1.0, 0.1, 0.28)
    found = a_run(0.5, late, good, a_record(1.0, 0.5, 0.0, 0.0), a_record(2.0, 0.1), late, edge=1)
    told = runs.figures(found, OBJECTIVE)
    assert told["attained"] == pytest.approx({"ttft": 1.0, "tpot": 1.0, "gap": 2 / 3, "joint": 2 / 3})
    assert (told["requests"], told["failed"]) == (3, 0)
    assert told["ttft_ms"]["p50"] == pytest.approx(1000)
    assert told["gap_ms"]["max"] == told["largest_gap_ms"]["max"] == pytest.approx(500)
    assert found.point(OBJECTIVE) == Point(0.5, 2, 3)
    each = runs.details(found, OBJECTIVE)
    assert [one["counted"] for one in each] == [False, True, True, True, False]
    assert [one["kept"] for one in each] == [False, True, False, True, False]
    assert each[1] | {"server": 0} == {
        "arrival_ms": 1000.0,
        "prompt_tokens": 10,
        "output_tokens": 3,
        "tokens": 3,
        "ttft_ms": 1000.0,
        "tpot_ms": 190.0,
        "largest_gap_ms": 280.0,
        "e2e_ms": 1380.0,
        "gaps_ms": [100.0, 280.0],
        "error": "",
        "server": 0,
        "counted": True,
        "kept": True,
    }


@dataclass
class Server:
    """Answers at once with as many tokens as wanted, but never more than it has."""

    most: int = 1000
    prompts: list[list[int]] = field(default_factory=list)
    devices = 2
    instances = 3
    name = "server"

    @contextmanager
    def served(self) -> Iterator[Connect]:
        """See Contestant."""
        yield self.connect

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Ask]:
        """See Connect."""
        yield self.ask

    async def ask(self, prompt: Prompt, output_tokens: int, record: Record) -> None:
        """See Ask."""
        assert isinstance(prompt, list)
        self.prompts.append(prompt)
        record.sent_s = record.ended_s = time.perf_counter()
        record.arrivals = [(record.sent_s, min(output_tokens, self.most))]


async def test_short_answers_have_failed() -> None:
    load = Load(MIXES["rival"], requests=4, edge=1, vocab_tokens=800, seed=1)
    whole = await runs.run(Server().connect, load, 200.0)
    assert [record.error for record in whole.records] == [""] * 6
    assert runs.figures(whole, OBJECTIVE)["rate_sent"] == pytest.approx(
        5 / (whole.records[-1].sent_s - whole.records[0].sent_s)
    )
    short = await runs.run(Server(most=15).connect, load, 200.0)
    assert short.records[0].error == f"SHORT: 15 of {short.arrivals[0].output_tokens} tokens"
    assert (short.point(OBJECTIVE).kept, runs.figures(short, OBJECTIVE)["failed"]) == (0, 4)
    with pytest.raises(InvalidRequestError, match="before the start failed: SHORT"):
        await runs.warmed_up(Server(most=15).connect, load, 1)


@pytest.mark.parametrize("warm_up", [0, 5])
def test_rates_that_are_told(
    warm_up: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each instance is warm before, and the second run of a rate has prompts of its own."""
    server = Server()
    monkeypatch.setattr(command, "_contestants", lambda *_: [server])
    (tmp_path / "config.json").write_text('{"vocab_size": 800}')
    (tmp_path / "model.safetensors").touch()
    arguments = f"--json --model {tmp_path} --rates 100 200 100 --requests 3 --edge 0 --warm-up {warm_up}"
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert command.run(command.parser().parse_args(arguments.split())) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["sequences"], found["preloaded"]) == (16, {})
    told = [(run["rate"], run["repeat"]) for run in found["arrangements"]["server"]["runs"]]
    assert told == [(100, 0), (200, 0), (100, 1)]
    assert len(server.prompts) == max(warm_up, 3) + 9
    assert len({tuple(prompt[:16]) for prompt in server.prompts}) == len(server.prompts)


def some_figures() -> dict[str, list[dict[str, Any]]]:
    good, late = a_record(1.0, 0.1), a_record(9.0, 0.1)
    return {
        name: [runs.figures(a_run(rate, *records), OBJECTIVE) for rate, *records in of]
        for name, of in {
            "apart": [(0.5, good, late), (0.4, good, good)],
            "vLLM apart 512": [(0.4, late, late)],
        }.items()
    }


def test_tables(tmp_path: Path) -> None:
    figures = some_figures()
    lines = [line.split() for line in table.of_runs(figures).splitlines()]
    assert [line[:3] for line in lines[1:3]] == [["apart", "0.400", "100.0%"], ["apart", "0.500", "50.0%"]]
    goodputs = {"apart": (2, Goodput(0.4, 0.5)), "whole": (2, Goodput(0.6, math.inf)), "none": (1, Goodput(0.0, 0.2))}
    lines = [line.split() for line in table.of_goodputs(goodputs).splitlines()]
    assert lines[1:] == [
        ["apart", "2", "0.400", "0.200", "0.400", "…", "0.500"],
        ["whole", "2", "≥", "0.600", "0.300", "no", "rate", "falls", "short"],
        ["none", "1", "0.000", "0.000", "0.000", "…", "0.200"],
    ]
    picture = tmp_path / "plot.png"
    plot.save(picture, figures, {name: (2, Goodput(0.4, 0.5)) for name in figures}, 0.9, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ours", "theirs", "gain", "met"),
    [
        ((2, Goodput(0.9, 9.0)), (2, Goodput(0.3, 0.33)), 3.0, True),
        ((2, Goodput(0.4, 9.0)), (2, Goodput(0.3, 0.33)), 4 / 3, False),
        ((2, Goodput(0.9, 9.0)), (2, Goodput(0.3, 0.4)), 2.25, False),  # it may bear up to 0.4
        ((8, Goodput(2.4, 9.0)), (2, Goodput(0.3, 0.33)), 2.0, False),  # with four times as many devices
        ((2, Goodput(0.9, 9.0)), (2, Goodput(0.0, 0.1)), math.nan, False),
        ((2, Goodput(0.9, 9.0)), (2, Goodput(0.3, math.inf)), math.nan, False),
        ((2, Goodput(0.0, 0.1)), (2, Goodput(0.0, 0.1)), math.nan, False),
        ((2, Goodput(0.0, 0.1)), (2, Goodput(0.3, 0.33)), 0.0, False),
    ],
)
def test_bars_against_a_rival(ours: tuple[int, Goodput], theirs: tuple[int, Goodput], gain: float, met: bool) -> None:
    goodputs = {"apart": ours, "vLLM apart 512": theirs}
    failed, lag, failed_of_rival, best, apart = bars.checks(some_figures(), goodputs, decides=True)
    assert (failed.value, failed_of_rival.value, lag.met) == (0, 0, True)
    assert [best.value, apart.value] == pytest.approx([gain, gain], nan_ok=True)
    assert (best.met, apart.met) == (gain >= bars.BEST_GAIN, met)
    assert [check.name for check in bars.checks(some_figures(), {"apart": (2, Goodput(1, 2))}, decides=True)] == [
        *(failed.name, lag.name)
    ]


@pytest.mark.parametrize("who", ["apart", "vLLM apart 512"])
def test_failures_of_any_contestant_count(who: str) -> None:
    figures = some_figures()
    figures[who].append(runs.figures(a_run(0.6, a_record(1.0, error="OVERLOADED"), a_record(1.0, 0.1)), OBJECTIVE))
    goodputs = {"apart": (2, Goodput(0.9, 1.0)), "vLLM apart 512": (2, Goodput(0.3, 0.33))}
    unmet = [(check.name, check.value) for check in bars.checks(figures, goodputs, decides=True) if not check.met]
    assert unmet == [("failed requests" if who == "apart" else "failed requests of vLLM", 1)]


def test_json_has_no_numbers_that_are_none() -> None:
    told = runs.details(a_run(0.5, a_record(1.0)), OBJECTIVE)
    assert math.isnan(told[0]["tpot_ms"])
    from zipserve.bench import report  # noqa: PLC0415

    assert json.loads(report.dumps(told))[0]["tpot_ms"] is None
