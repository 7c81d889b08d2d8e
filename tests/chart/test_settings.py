"""Settings of the services and values of the chart are the same ones, both ways."""

import os
import re
from typing import Any

import pytest
import yaml

from chart import CHART, EXAMPLES, example, merged, render
from chart_schema import OWN, SCHEMA, SETTINGS, settings_of, text

NAME = re.compile(r"ZIPSERVE_([A-Z]+)_([A-Z0-9_]+)$")
SAMPLES = {
    "weights": "int8", "dtype": "bfloat16", "log_level": "debug", "log_format": "console", "device": "cuda",
    "otlp_endpoint": "https://collector:4317", "heartbeat_s": 0.25, "registry_ttl_s": 2.5, "drain_s": 45.5,
    "lease_ttl_s": 12, "block_tokens": 256, "queue_tokens_max": 2**40, "fetch_cost": 0.125, "step_slowdown_max": 1.25,
    "reflection": True,
}  # fmt: skip


def sample(field: str, kind: Any) -> Any:
    """A value that is not the default."""
    if field in SAMPLES:
        return SAMPLES[field]
    return 7.5 if kind is float else 4_000_000 if "_bytes" in field else 77


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("ZIPSERVE_", "OTEL_"))]:
        monkeypatch.delenv(name)


def test_the_schema_is_that_of_the_settings() -> None:
    assert SCHEMA.read_text() == text(), "run: python -P tests/support/chart_schema.py"


@pytest.mark.parametrize("service", SETTINGS)
def test_every_setting_is_reached_by_a_value_or_made_by_the_chart(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that values may say at once arrives at the class, with the value that was given."""
    cls = SETTINGS[service]
    given = {field: sample(field, cls.model_fields[field].annotation) for field in settings_of(cls)["properties"]}
    assert set(given) | set(OWN) >= set(cls.model_fields)
    layout = {field: given[field] for field in ("block_tokens", "dtype") if field in given}
    workers = {worker: {"settings": layout} for worker in ("prefill", "decode")}
    public = {"publicTls": {"mode": "existingSecret", "existingSecret": "s", "clientCa": True}}
    made = render(merged(public, workers, {service: {"settings": given}}))
    (workload,) = made.workloads(service)
    environment = made.environment(workload)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = cls.load([])
    assert {field: getattr(settings, field) for field in given} == given
    told = {name for name in environment if name.startswith("ZIPSERVE_")}
    assert told == {f"ZIPSERVE_{service}_{field}".upper() for field in cls.model_fields}


@pytest.mark.parametrize("name", EXAMPLES)
def test_services_start_with_the_environment_of_every_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = render(example(name))
    workloads = [(service, each) for service in SETTINGS for each in made.workloads(service)]
    for service, workload in workloads:
        with monkeypatch.context() as context:
            for variable, value in made.environment(workload).items():
                context.setenv(variable, value)
            settings = SETTINGS[service].load([])
        assert settings.worker_id == f"{workload['metadata']['name']}-0"
        assert settings.cluster == "ml.zs"
        address = "[10.1.2.3]" if name == "colocated" else "10.1.2.3"
        assert settings.advertised(7000) == f"{address}:7000"
        assert (settings.tls is None) == (name == "open")


def test_names_in_templates_are_settings() -> None:
    """Of what a template writes out by itself; what it loops over is compared above."""
    fields = {(service.upper(), field.upper()) for service, cls in SETTINGS.items() for field in cls.model_fields}
    written = re.findall(
        r"ZIPSERVE_([A-Z]+)_([A-Z_]+)", "".join(p.read_text() for p in CHART.rglob("*.*") if p.is_file())
    )
    assert set(written) - fields == set()


def test_settings_of_all_services_go_below_their_own() -> None:
    made = render({"settings": {"log_level": "debug", "drain_s": 20}, "router": {"settings": {"log_level": "error"}}})
    (router,), (decode,) = made.workloads("router"), made.workloads("decode")
    assert made.environment(router)["ZIPSERVE_ROUTER_LOG_LEVEL"] == "error"
    assert made.environment(decode)["ZIPSERVE_DECODE_LOG_LEVEL"] == "debug"
    assert made.environment(decode)["ZIPSERVE_DECODE_DRAIN_S"] == "120"  # values.yaml has one for decode


def test_blocks_of_values_have_the_same_keys_in_the_same_order() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    keys = list(values["router"])
    for service in ("prefill", "decode", "kvstore"):
        assert list(values[service])[: len(keys)] == keys
    assert list(values["prefill"])[len(keys) :] == list(values["decode"])[len(keys) :] == ["tensorParallel", "groups"]


def test_what_the_chart_makes_by_itself_is_a_setting() -> None:
    fields = {field for cls in SETTINGS.values() for field in cls.model_fields}
    assert set(OWN) - fields == set()
