"""What the chart asks Prometheus: its rules, and the queries of dashboards and autoscalers."""

import json
from typing import Any

from chart import CHART, example, merged, render

RULES = {"monitoring": {"rules": {"enabled": True}}}


def rules(values: dict[str, Any]) -> dict[str, Any]:
    """The groups of rules that an installation has."""
    spec: dict[str, Any] = render(merged(values, RULES)).one("PrometheusRule", "zs-zipserve")["spec"]
    return spec


def recorded(name: str) -> list[dict[str, Any]]:
    """The rules of one of the files in ci/."""
    return [rule for group in rules(example(name))["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """All PromQL of rules, dashboards and autoscalers."""
    found = [rule["expr"] for name in ("keda", "groups") for rule in recorded(name)]
    for path in (CHART / "dashboards").glob("*.json"):
        dashboard = json.loads(path.read_text())
        found += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        found += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    scaled = render(example("keda")).of("ScaledObject").values()
    return found + [trigger["metadata"]["query"] for each in scaled for trigger in each["spec"]["triggers"]]
