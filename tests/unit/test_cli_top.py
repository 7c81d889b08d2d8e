"""`zipserve top`: expositions read, two looks put together, and what is shown of them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from zipserve.cli import __main__ as cli
from zipserve.cli.board import Board, Look, Process, board, lines
from zipserve.cli.exposition import Exposition, added, parse, quantile, since
from zipserve.common.metrics import Metrics


def exposed(metrics: Metrics) -> Exposition:
    """As a service would answer."""
    return parse(generate_latest(metrics.registry).decode())


def levels(metrics: Metrics, used: int, idle: int, free: int) -> None:
    for state, count in (("used", used), ("idle", idle), ("free", free)):
        metrics.slabs.labels("block", "zip-4/32", "4/32", state).set(count)


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.text(), min_size=1), st.floats(allow_nan=False))
def test_what_prometheus_writes_is_read(labels: dict[str, str], value: float) -> None:
    registry = CollectorRegistry()
    gauge = Counter("x", "help # with { odd } signs", sorted(labels), registry=registry)
    if value < 0 or math.isinf(value):
        value = 1.0
    gauge.labels(**labels).inc(value)
    found = parse(generate_latest(registry).decode())
    assert found.total("x_total", **labels) == value
    assert [dict(sample.labels) for sample in found.samples["x_total"]] == [labels]


def test_lines_that_are_no_samples_are_passed_over() -> None:
    assert parse('# HELP x y\n\nnonsense\nx 1\nx{a="b"} 2 1700000000\n').by("x", "a") == {"": 1.0, "b": 2.0}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_quantile_is_within_its_bucket(share: float) -> None:
    registry = CollectorRegistry()
    histogram = Histogram("x_seconds", "x", buckets=(0.01, 0.1, 1.0), registry=registry)
    values = [0.005] * 60 + [0.05] * 35 + [0.5] * 5
    for one in values:
        histogram.observe(one)
    found = quantile(parse(generate_latest(registry).decode()).buckets("x_seconds"), share)
    exact = sorted(values)[math.ceil(share * len(values)) - 1]
    low, high = max(b for b in (0.0, 0.01, 0.1) if b < exact), min(b for b in (0.01, 0.1, 1.0) if b >= exact)
    assert found is not None
    assert low <= found <= high


def test_quantiles_at_the_edges() -> None:
    assert quantile({}, 0.5) is None
    assert quantile({1.0: 0.0, math.inf: 0.0}, 0.5) is None
    assert quantile({1.0: 0.0, math.inf: 4.0}, 0.5) == 1.0
    assert quantile({1.0: 4.0, math.inf: 4.0}, 1.0) == 1.0


def test_a_histogram_that_was_started_anew_counts_as_a_whole() -> None:
    assert since({1.0: 5.0}, {1.0: 3.0}) == {1.0: 2.0}
    assert since({1.0: 2.0}, {1.0: 3.0}) == {1.0: 2.0}


def a_cluster() -> tuple[dict[str, Metrics], list[Look]]:
    """A router, a prefill and a decode worker, and a look at them before anything happens."""
    metrics = {"router": Metrics("router"), "prefill-0": Metrics("prefill"), "decode-0": Metrics("decode")}
    levels(metrics["prefill-0"], 3, 2, 5)
    levels(metrics["decode-0"], 1, 0, 9)
    return metrics, [look(metrics, 10.0)]


def look(metrics: dict[str, Metrics], at_s: float) -> Look:
    return Look(at_s, [Process(n, n.partition("-")[0], f"{n}:1", "ready", exposed(m)) for n, m in metrics.items()])


def test_a_board_tells_levels_rates_and_latencies() -> None:
    metrics, looks = a_cluster()
    for _ in range(100):
        metrics["router"].first_token_seconds.observe(0.2)
        metrics["router"].inter_token_seconds.observe(0.004)
    metrics["router"].requests.labels("", "OK").inc(8)
    metrics["router"].rejections.labels("OVERLOADED").inc(3)
    metrics["router"].deadline_misses.labels("queue").inc(1)
    metrics["router"].generated_tokens.inc(200)
    metrics["prefill-0"].prompt_tokens.inc(4000)
    metrics["decode-0"].generated_tokens.inc(200)
    metrics["decode-0"].transfer_bytes.labels("prefill").inc(8_000_000)
    metrics["decode-0"].handoff_failures.labels("BLOCK_CORRUPT").inc(2)
    metrics["decode-0"].running_requests.set(4)
    shown = board(looks[0], look(metrics, 14.0))
    rows = {row.name: row for row in shown.rows}
    assert rows["prefill-0"].tokens_per_s == 1000
    assert (rows["decode-0"].tokens_per_s, rows["decode-0"].running) == (50, 4)
    assert (rows["prefill-0"].blocks_used, rows["prefill-0"].blocks_idle, rows["prefill-0"].blocks_free) == (3, 2, 5)
    assert shown.requests_per_s == 2
    assert shown.flow_bytes_per_s == {"prefill>decode": 2_000_000}
    assert 0.1 < (shown.latency_s["ttft"]["p50"] or 0) <= 0.25
    assert 0.003 < (shown.latency_s["itl"]["p99"] or 0) <= 0.005
    assert shown.latency_s["request"] == {"p50": None, "p90": None, "p99": None}
    assert shown.reasons["rejected"] == {"OVERLOADED": 3}
    assert shown.reasons["refused_kv"] == {"BLOCK_CORRUPT": 2}
    assert shown.reasons["deadline"] == {"queue": 1}
    text = "\n".join(lines(shown))
    for words in ("decode-0", "2.0 requests/s", "prefill → decode", "2.00 MB/s", "OVERLOADED 3", "queue 1"):
        assert words in text
    assert len({len(line) for line in lines(shown)[:4]}) == 1, "columns stand below each other"
    assert json.loads(json.dumps(shown.as_dict()))["rows"][1]["tokens_per_s"] == 1000


def test_latencies_are_those_of_the_interval() -> None:
    metrics, _ = a_cluster()
    metrics["router"].first_token_seconds.observe(50.0)
    before = look(metrics, 0.0)
    for _ in range(10):
        metrics["router"].first_token_seconds.observe(0.02)
    p99 = board(before, look(metrics, 1.0)).latency_s["ttft"]["p99"]
    assert p99 is not None
    assert p99 < 0.03


def test_a_process_that_came_or_was_started_anew_has_no_rate_yet() -> None:
    metrics, looks = a_cluster()
    metrics["decode-0"].generated_tokens.inc(100)
    grown = look(metrics, 12.0)
    fresh = {**metrics, "decode-0": Metrics("decode"), "decode-1": metrics["decode-0"]}
    rows = {row.name: row.tokens_per_s for row in board(grown, look(fresh, 13.0)).rows}
    assert (rows["decode-0"], rows["decode-1"]) == (0, 0)
    assert looks


def test_who_cannot_be_asked_is_shown_all_the_same() -> None:
    gone = Look(1.0, [Process("decode-0", "decode", "x:1", "no metrics: refused")])
    shown: Board = board(gone, Look(2.0, gone.processes))
    assert "no metrics: refused" in lines(shown)[1]


def test_services_are_added_up() -> None:
    one, other = parse("x_total 1\n"), parse("x_total 2\n")
    assert added([one, other]).total("x_total") == 3


def test_top_over_http_once_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics("decode")
    metrics.build_info.labels("decode", "0", "m", "raw").set(1)
    levels(metrics, 1, 2, 3)
    port = metrics.serve("127.0.0.1", 0)
    status = cli.main(["top", "--metrics", f"127.0.0.1:{port}", "--metrics", "127.0.0.1:1", "--once", "--json",
                       "--interval", "0.01"])  # fmt: skip
    assert status == 0
    (row, lost) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["role"], row["blocks_used"], row["blocks_free"], row["state"]) == ("decode", 1, 3, "ready")
    assert lost["state"].startswith("no metrics")


def test_top_without_a_stack_says_so(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert cli.main(["top", "--log-dir", str(tmp_path), "--once"]) == 1
    assert "stack.json" in capsys.readouterr().err
