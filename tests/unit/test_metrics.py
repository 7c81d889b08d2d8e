"""The metrics of each service, their reference, and Prometheus' conventions."""

import re
import timeit
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from zipserve.common import metrics_reference
from zipserve.common.kv.layout import Layout
from zipserve.common.kv.pools import SlabPools
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.levels import tell_build, watch_pools
from zipserve.common.metrics import SERVICES, Metrics
from zipserve.common.quick_histogram import QuickHistogram

_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (\w*) \| .+ \|$", re.MULTILINE)
_BASE_UNITS = {"seconds", "bytes"}
_OTHER_UNITS = {"milliseconds", "ms", "minutes", "hours", "kilobytes", "kib", "mib", "megabytes", "percent", "bits"}


def test_the_reference_is_what_the_services_register() -> None:
    page = _PAGE.read_text()
    assert page == metrics_reference.renewed(page), "it is not up to date; it says itself how to write it"
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in _ROW.findall(page)}
    registered: dict[str, tuple[str, tuple[str, ...]]] = {}
    for service in SERVICES:
        metrics = Metrics(service)
        names = {name.removesuffix("_total") for name in metrics.registry._names_to_collectors}
        assert {metric.name.removesuffix("_total") for metric in metrics.described} <= names
        registered |= {metric.name: (metric.kind, metric.labels) for metric in metrics.described}
    assert told == registered


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_tells_nothing_that_it_does_not_know(service: str) -> None:
    metrics = Metrics(service)
    metrics.first_token_seconds.observe(1.0)
    metrics.disk_blocks.set(1)
    metrics.parkings.inc()
    names = {family.name for family in metrics.registry.collect()}
    assert ("zipserve_first_token_seconds" in names) == (service == "router")
    assert ("zipserve_kv_disk_blocks" in names) == (service == "kvstore")
    assert ("zipserve_parkings" in names) == (service == "decode")


def test_errors_that_alerts_go_by_are_told_before_the_first() -> None:
    def told(service: str, name: str, reason: str) -> float | None:
        return Metrics(service).registry.get_sample_value(f"zipserve_{name}_total", {"reason": reason})

    for service in ("prefill", "decode", "kvstore"):
        for reason in ("BLOCK_CORRUPT", "BLOCK_SWAPPED", "HANDLE_FORGED", "TRANSFER_FAILED"):
            assert told(service, "kv_handoff_failures", reason) == 0
    assert told("router", "replays", "WORKER_LOST") == told("router", "replays", "LEASE_EXPIRED") == 0
    assert told("decode", "kv_handoff_failures", "INVALID_REQUEST") is None
    assert told("router", "replays", "INVALID_REQUEST") is None


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in Metrics().described:
        words = metric.name.removesuffix("_total").split("_")
        assert re.fullmatch(r"zipserve(_[a-z]+)+", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), f"{metric.name}: counters"
        assert not _OTHER_UNITS & set(words[:-1]) - {"bits"}, f"{metric.name}: base units only"
        assert not _BASE_UNITS & set(words[:-1]), f"{metric.name}: the unit comes last"
        if metric.kind == "histogram":
            assert words[-1] in _BASE_UNITS, f"{metric.name}: a histogram has a unit"
        assert metric.kind not in words, f"{metric.name}: the type is no part of the name"
        assert not {"le", "quantile", "instance", "job", "request_id", "worker"} & set(metric.labels), metric.name
        assert metric.meaning[0].isupper() or metric.meaning[0].isdigit()
        assert not metric.meaning.endswith("."), metric.name


def test_buckets_reach_from_the_fastest_token_to_the_slowest_first_one() -> None:
    metrics = Metrics()
    assert metrics.inter_token_seconds._limits[0] == 0.001
    assert metrics.first_token_seconds._upper_bounds[-2] == 120.0


@given(st.lists(st.floats(0, 20), max_size=30))
def test_the_quick_histogram_tells_what_the_librarys_would(values: list[float]) -> None:
    quick, usual = CollectorRegistry(), CollectorRegistry()
    both = (
        QuickHistogram("x_seconds", "x", (0.01, 0.1, 1.0), quick),
        Histogram("x_seconds", "x", buckets=(0.01, 0.1, 1.0), registry=usual),
    )
    for one in values:
        for histogram in both:
            histogram.observe(one)
    told, expected = (
        {(s.name, s.labels.get("le")): s.value for family in registry.collect() for s in family.samples}
        for registry in (quick, usual)
    )
    assert told == {key: value for key, value in expected.items() if not key[0].endswith("_created")}


def test_levels_of_the_pools_are_read_when_somebody_asks() -> None:
    metrics, layout = (
        Metrics("decode"),
        Layout(
            "m", "r", layers=1, kv_heads=1, key_dim=16, value_dim=16, dtype="float32", codec="zip-4/32", block_tokens=64
        ),
    )
    pools = SlabPools(layout, blocks=8, tails=2, sinks=4)
    tell_build(metrics, "decode", layout)
    watch_pools(metrics, layout, PrefixIndex(pools))
    held = pools.try_take(3 * layout.block_tokens, tail_of=0)
    assert held is not None

    def slabs(arena: str, state: str, precision: str) -> float | None:
        labels = {"arena": arena, "codec": "zip-4/32", "precision": precision, "state": state}
        return metrics.registry.get_sample_value("zipserve_kv_slabs", labels)

    assert [slabs("block", state, "4/32") for state in ("used", "idle", "free")] == [3, 0, 5]
    assert (slabs("sinks", "used", "float16"), slabs("tail", "free", "8")) == (1, 2)
    pools.give_back(held)
    assert slabs("block", "used", "4/32") == 0
    assert metrics.registry.get_sample_value("zipserve_kv_blocks_free") == 8
    families = {family.name: family for family in metrics.registry.collect()}
    (build,) = families["zipserve_build_info"].samples
    assert (build.labels["service"], build.labels["codec"], build.value) == ("decode", "zip-4/32", 1)


def test_metrics_are_served_on_a_free_port() -> None:
    metrics = Metrics("router")
    metrics.requests.labels("team-a", "OK").inc()
    assert metrics.serve("127.0.0.1", None) is None
    port = metrics.serve("127.0.0.1", 0)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    ours = [s for s in samples if s.name == "zipserve_requests_total"]
    assert [(s.labels, s.value) for s in ours] == [({"caller": "team-a", "reason": "OK"}, 1.0)]


def test_a_token_costs_less_than_two_microseconds() -> None:
    observe = Metrics("router").inter_token_seconds.observe
    best_s = min(timeit.repeat(lambda: observe(0.02), number=5_000, repeat=20)) / 5_000
    assert best_s < 2e-6, f"{best_s * 1e6:.2f} us"
