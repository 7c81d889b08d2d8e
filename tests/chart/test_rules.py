"""Alerts and recording rules as Prometheus' own tool evaluates them, and metrics that somebody tells."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chart import CHART, example, render
from chart_queries import expressions, recorded, rules
from images import REPOSITORY
from zipserve.common.metrics import SERVICES, Metrics

PROMTOOL = shutil.which("promtool", path=str(Path(sys.executable).parent)) or shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: Debian's package prometheus has it")
IN_RELEASE = 'namespace="ml", release="zs"'

Series = dict[str, str]

OK = {'zipserve_requests_total{job="router", reason="OK"}': "0+94x80"}
FAULTS: dict[str, tuple[Series, dict[str, str], str]] = {
    # what is seen, the alert's labels, its summary
    "ZipserveServiceGone": (
        {'zipserve_build_info{job="decode", version="1"}': "1x80"},
        {"job": "router", "severity": "critical"},
        "No router answers in zs; nothing is generated.",
    ),
    "ZipserveTargetDown": (
        {'up{job="prefill", pod="p0"}': "0x80"},
        {"job": "prefill", "pod": "p0", "severity": "warning"},
        "prefill p0 tells no metrics.",
    ),
    "ZipserveRequestsFail": (
        {**OK, 'zipserve_requests_total{job="router", reason="INTERNAL"}': "0+6x80"},
        {"severity": "critical"},
        "6% of the requests of zs fail for reasons of ours.",
    ),
    "ZipserveRequestsRejected": (
        {**OK, 'zipserve_requests_total{job="router", reason="OVERLOADED"}': "0+6x80"},
        {"severity": "warning"},
        "6% of the requests of zs are refused for want of room.",
    ),
    "ZipserveFirstTokenLate": (
        {
            'zipserve_first_token_seconds_bucket{job="router", le="1.0"}': "0+80x80",
            'zipserve_first_token_seconds_count{job="router"}': "0+100x80",
        },
        {"severity": "warning"},
        "Only 80% of the first tokens come within 1.0 s.",
    ),
    "ZipserveTokensLate": (
        {
            'zipserve_inter_token_seconds_bucket{job="router", le="0.1"}': "0+80x80",
            'zipserve_inter_token_seconds_count{job="router"}': "0+100x80",
        },
        {"severity": "warning"},
        "Only 80% of the tokens come within 0.1 s.",
    ),
    "ZipserveDeadlinesMissed": (
        {
            'zipserve_requests_total{job="router", reason="DEADLINE_EXCEEDED"}': "0+100x80",
            'zipserve_deadline_misses_total{job="router", stage="queue"}': "0+6x80",
        },
        {"stage": "queue", "severity": "warning"},
        "6% of the requests miss their deadline in queue.",
    ),
    "ZipserveKvCorrupt": (
        {'zipserve_kv_handoff_failures_total{job="decode", pod="d0", reason="BLOCK_CORRUPT"}': "0x15 1x80"},
        {"job": "decode", "pod": "d0", "reason": "BLOCK_CORRUPT", "severity": "critical"},
        "d0 refused KV: BLOCK_CORRUPT. No wrong token was served; memory or network is at fault.",
    ),
    "ZipserveHandoffsFail": (
        {
            'zipserve_kv_handoff_failures_total{job="decode", pod="d0", reason="LEASE_EXPIRED"}': "0+6x80",
            'zipserve_kv_transfer_seconds_count{job="decode", pod="d0", source="prefill"}': "0+94x80",
        },
        {"severity": "warning"},
        "6% of the reads of KV are refused or lost.",
    ),
    "ZipserveReplays": (
        {
            'zipserve_requests_total{job="router", reason="OK"}': "0+100x80",
            'zipserve_replays_total{job="router", reason="WORKER_LOST"}': "0+6x80",
        },
        {"severity": "warning"},
        "6% replays for each request: workers die, or lose what they hand over.",
    ),
    "ZipserveLeasesExpire": (
        {'zipserve_kv_leases_expired_total{job="prefill", pod="p0"}': "0+12x80"},
        {"job": "prefill", "severity": "warning"},
        "KV that prefill lends is not fetched in time.",
    ),
    "ZipservePoolFull": (
        {
            'zipserve_kv_slabs{job="decode", pod="d0", arena="block", state="used"}': "96x80",
            'zipserve_kv_slabs{job="decode", pod="d0", arena="block", state="idle"}': "4x80",
        },
        {"job": "decode", "pod": "d0", "severity": "warning"},
        "decode d0 uses 96% of its KV blocks.",
    ),
    "ZipserveSequencesParked": (
        {'zipserve_parked_requests{job="decode", pod="d0"}': "2x80"},
        {"pod": "d0", "severity": "warning"},
        "d0 keeps 2 sequences in host memory for want of KV blocks.",
    ),
    "ZipserveMixedVersions": (
        {
            'zipserve_build_info{job="decode", pod="d0", version="1"}': "1x80",
            'zipserve_build_info{job="decode", pod="d1", version="2"}': "1x80",
        },
        {"severity": "info"},
        "zs runs 2 versions: an upgrade has not ended.",
    ),
}
HEALTH: Series = {
    **{f'zipserve_build_info{{job="{job}", pod="a", version="1"}}': "1x80" for job in SERVICES},
    **{f'up{{job="{job}", pod="a"}}': "1x80" for job in SERVICES},
    'zipserve_requests_total{job="router", reason="OK"}': "0+96x80",
    'zipserve_requests_total{job="router", reason="INTERNAL"}': "0+4x80",
    'zipserve_requests_total{job="router", reason="INVALID_REQUEST"}': "0+90x80",
    'zipserve_first_token_seconds_bucket{job="router", le="1.0"}': "0+91x80",
    'zipserve_first_token_seconds_count{job="router"}': "0+100x80",
    'zipserve_inter_token_seconds_bucket{job="router", le="0.1"}': "0+91x80",
    'zipserve_inter_token_seconds_count{job="router"}': "0+100x80",
    'zipserve_kv_handoff_failures_total{job="decode", pod="a", reason="LEASE_EXPIRED"}': "0+1x80",
    'zipserve_kv_transfer_seconds_count{job="decode", pod="a", source="prefill"}': "0+100x80",
    'zipserve_replays_total{job="router", reason="WORKER_LOST"}': "0+1x80",
    'zipserve_kv_leases_expired_total{job="prefill", pod="a"}': "0+1x80",
    'zipserve_kv_slabs{job="decode", pod="a", arena="block", state="used"}': "90x80",
    'zipserve_kv_slabs{job="decode", pod="a", arena="block", state="idle"}': "10x80",
    'zipserve_parked_requests{job="decode", pod="a"}': "0x80",
}


def alerts() -> dict[str, Any]:
    groups = rules({})["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def promtool(*arguments: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def evaluate(folder: Path, values: dict[str, Any], tests: list[dict[str, Any]]) -> None:
    """Has promtool compare what the rendered rules make of series with what they should."""
    (folder / "rules.yaml").write_text(json.dumps(rules(values)))
    checks = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(json.dumps(checks))
    promtool("test", "rules", folder / "tests.yaml")


def inputs(series: Series) -> list[dict[str, str]]:
    """All of one release; a release of the same name elsewhere must not count."""
    return [
        {"series": name.replace("}", f', namespace="{namespace}", release="zs"}}'), "values": values}
        for name, values in series.items()
        for namespace in ("ml", "elsewhere")
    ]


def fires(name: str, series: Series, labels: dict[str, str], summary: str) -> dict[str, Any]:
    """That an alert tells this of what is seen."""
    expected = {
        "exp_labels": {"namespace": "ml", "release": "zs", **labels},
        "exp_annotations": {"summary": summary},
    }
    eval_time = "70m" if name == "ZipserveMixedVersions" else "20m"
    test = {"eval_time": eval_time, "alertname": name, "exp_alerts": [expected]}
    return {"interval": "1m", "input_series": inputs(series), "alert_rule_test": [test]}


@needs_promtool
@pytest.mark.parametrize("name", ["minimal", "keda", "hpa", "groups"])
def test_promtool_takes_the_rules(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(json.dumps(rules(example(name))))
    promtool("check", "rules", path)


@needs_promtool
def test_every_alert_fires_at_its_fault(tmp_path: Path) -> None:
    assert set(FAULTS) == set(alerts())
    evaluate(tmp_path, {}, [fires(name, *fault) for name, fault in FAULTS.items()])


@needs_promtool
def test_handoffs_that_never_succeeded_are_told(tmp_path: Path) -> None:
    series = {'zipserve_kv_handoff_failures_total{job="decode", pod="d0", reason="TRANSFER_FAILED"}': "0+6x80"}
    summary = "100% of the reads of KV are refused or lost."
    evaluate(tmp_path, {}, [fires("ZipserveHandoffsFail", series, {"severity": "warning"}, summary)])


@needs_promtool
def test_no_alert_fires_in_health(tmp_path: Path) -> None:
    silent = [{"eval_time": "75m", "alertname": name, "exp_alerts": []} for name in alerts()]
    evaluate(tmp_path, {}, [{"interval": "1m", "input_series": inputs(HEALTH), "alert_rule_test": silent}])


def wanted(service: str, replicas: float) -> dict[str, Any]:
    labels = f'{{{IN_RELEASE}, service="{service}", group="default"}}'
    return sample(f"zipserve:replicas_wanted{labels}", labels, replicas)


def sample(series: str, labels: str, value: float) -> dict[str, Any]:
    samples = [{"labels": labels, "value": value}]
    return {"expr": f"round({series}, 0.001)", "eval_time": "20m", "exp_samples": samples}


@needs_promtool
def test_replicas_follow_their_signals(tmp_path: Path) -> None:
    one = 'group="default", job='
    series = {
        f'zipserve_running_requests{{{one}"router", pod="r0"}}': "640x30",
        f'zipserve_queued_requests{{{one}"router", pod="r0"}}': "140x30",
        # two workers that compute half of the time, 800 tokens in a second of theirs, and 4000 tokens that wait
        f'zipserve_queued_tokens{{{one}"prefill", pod="p0"}}': "3000x30",
        f'zipserve_queued_tokens{{{one}"prefill", pod="p1"}}': "1000x30",
        f'zipserve_step_seconds_sum{{{one}"prefill", pod="p0"}}': "0+30x30",
        f'zipserve_step_seconds_sum{{{one}"prefill", pod="p1"}}': "0+30x30",
        f'zipserve_prompt_tokens_total{{{one}"prefill", pod="p0"}}': "0+60000x30",
        f'zipserve_cached_prompt_tokens_total{{{one}"prefill", pod="p0"}}': "0+12000x30",
        f'zipserve_kv_slabs{{{one}"decode", pod="d0", arena="block", state="used"}}': "90x30",
        f'zipserve_kv_slabs{{{one}"decode", pod="d0", arena="block", state="idle"}}': "10x30",
        f'zipserve_running_requests{{{one}"decode", pod="d0"}}': "60x30",
        f'zipserve_queued_requests{{{one}"decode", pod="d0"}}': "16x30",
        f'zipserve_parked_requests{{{one}"decode", pod="d0"}}': "0.8x30",
        f'zipserve_kv_slabs{{{one}"kvstore", pod="k0", arena="block", state="used"}}': "80x30",
        f'zipserve_kv_slabs{{{one}"kvstore", pod="k0", arena="block", state="free"}}': "20x30",
        **{f'zipserve_build_info{{job="decode", pod="d{n}"}}': "1x30" for n in range(4)},
    }
    expected = [wanted("router", 5), wanted("prefill", 5), wanted("decode", 3), wanted("kvstore", 1)]
    few = {name: values for name, values in series.items() if not re.search('build_info.*"d[12]"', name)}
    evaluate(
        tmp_path,
        example("keda"),
        [
            {"interval": "1m", "input_series": inputs(series), "promql_expr_test": expected},
            # for two decode workers there may be twice as many prefill workers
            {"interval": "1m", "input_series": inputs(few), "promql_expr_test": [wanted("prefill", 4)]},
        ],
    )


@needs_promtool
def test_goodput_is_what_is_answered_in_time(tmp_path: Path) -> None:
    series = {
        'zipserve_requests_total{job="router", reason="OK"}': "0+60x30",
        'zipserve_requests_total{job="router", reason="INTERNAL"}': "0+60x30",
        'zipserve_first_token_seconds_bucket{job="router", le="1.0"}': "0+90x30",
        'zipserve_first_token_seconds_count{job="router"}': "0+100x30",
        'zipserve_inter_token_seconds_bucket{job="router", le="0.1"}': "0+50x30",
        'zipserve_inter_token_seconds_count{job="router"}': "0+100x30",
    }
    labels = f"{{{IN_RELEASE}}}"
    expected = sample(f"zipserve:goodput:rate5m{labels}", labels, 0.45)
    evaluate(tmp_path, {}, [{"interval": "1m", "input_series": inputs(series), "promql_expr_test": [expected]}])


def test_every_alert_has_a_runbook() -> None:
    pages = {path.stem for path in (REPOSITORY / "docs/runbooks").glob("Zipserve*.md")}
    assert pages == set(alerts())
    assert [name for name, alert in alerts().items() if "runbook_url" in alert["annotations"]] == []
    for folder in ("https://example.com/runbooks", "https://example.com/runbooks/"):
        groups = rules({"monitoring": {"rules": {"runbooks": folder}}})["groups"]
        told = {rule["alert"]: rule["annotations"] for group in groups for rule in group["rules"] if "alert" in rule}
        urls = {name: annotations["runbook_url"] for name, annotations in told.items()}
        assert urls == {name: f"https://example.com/runbooks/{name}.md" for name in pages}


def test_every_metric_is_one_that_a_service_tells() -> None:
    """With its labels, and by the service that it is asked of."""
    told: dict[str, tuple[set[str], set[str]]] = {}
    for metric in Metrics().described:
        for suffix in ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",):
            labels = {*metric.labels, "le"} if suffix == "_bucket" else set(metric.labels)
            told[metric.name + suffix] = labels, set(metric.services)
    added = {"namespace", "release", "job", "group", "pod"}
    for expression in expressions():
        for name, selector in re.findall(r"\b(zipserve_\w+)(?:\{([^}]*)\})?", expression):
            assert name in told, expression
            labels, services = told[name]
            assert set(re.findall(r"(\w+)\s*(?:=|!)", selector)) <= labels | added, expression
            for job in re.findall(r'job=~?"([^"]*)"', selector):
                assert set(job.split("|")) <= services, expression


def test_every_recorded_series_is_recorded() -> None:
    used = {name for expression in expressions() for name in re.findall(r"zipserve:[\w:]+", expression)}
    assert used <= {rule["record"] for rule in recorded("keda") if "record" in rule}


def test_dashboards_are_in_config_maps() -> None:
    maps = render({"monitoring": {"dashboards": {"enabled": True}}}).of("ConfigMap")
    assert set(maps) == {"zs-zipserve-cluster", "zs-zipserve-requests", "zs-zipserve-kv"}
    for each in maps.values():
        ((name, text),) = each["data"].items()
        assert json.loads(text) == json.loads((CHART / "dashboards" / name).read_text())
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
