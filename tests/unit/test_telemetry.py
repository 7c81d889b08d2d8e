"""Tracing that is off, or has nobody to send to."""

import time
import timeit
from typing import Any

import pytest

from zipserve.common import telemetry, tracing
from zipserve.common.settings import ServiceSettings


def settings(**values: Any) -> ServiceSettings:
    return ServiceSettings.model_validate({"secret": "a secret for tests only", **values})


def test_what_is_off_costs_nothing_and_tells_nobody() -> None:
    with telemetry.exporting("router", settings(otlp_endpoint="")), tracing.span("a") as span:
        assert not span.is_recording()
        assert tracing.outgoing("r") == [("x-request-id", "r")]
        assert tracing.record("b", 0.0, 1.0) is tracing.start("c") is tracing.NONE

    def one() -> None:
        with tracing.span("a"):
            pass

    assert min(timeit.repeat(one, number=1000, repeat=20)) / 1000 < 5e-6


def test_a_collector_that_is_gone_does_not_hold_up_the_end() -> None:
    with telemetry.exporting("router", settings(otlp_endpoint="http://127.0.0.1:1")):
        with tracing.span("a") as span:
            assert span.is_recording()
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 5.0
    assert not tracing.start("b").is_recording()


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1"}, "http://a:1"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b:2"},
            "http://b:2",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({}, ""),
    ],
)
def test_the_standard_variables_say_where_traces_go(
    environment: dict[str, str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert settings().otlp_endpoint == endpoint
    assert settings(otlp_endpoint="http://c:3").otlp_endpoint == "http://c:3"
