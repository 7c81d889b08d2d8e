"""Logs: one JSON object per line on stderr, with what was bound, and without anybody's secrets."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from zipserve.common import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The configuration is the process's own: put it back."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == "", "stdout belongs to answers"
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_is_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(level="info", style="json", service="prefill", worker_id="p0")
    log.get().info("block.evicted", blocks=3, seconds=0.5, text="one\ntwo ☃", where=object)
    (line,) = lines(capsys)
    assert line["event"] == "block.evicted"
    assert (line["service"], line["worker_id"], line["level"]) == ("prefill", "p0", "info")
    assert (line["blocks"], line["seconds"], line["text"]) == (3, 0.5, "one\ntwo ☃")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("debug", ["a.debug", "a.info", "a.warning", "a.error"]),
        ("info", ["a.info", "a.warning", "a.error"]),
        ("warning", ["a.warning", "a.error"]),
        ("error", ["a.error"]),
    ],
)
def test_levels(level: str, events: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(level=level, style="json")
    logger = log.get()
    for method in ("debug", "info", "warning", "error"):
        getattr(logger, method)(f"a.{method}")
    assert [line["event"] for line in lines(capsys)] == events


def test_a_logger_made_before_configure_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    logger = log.get()
    log.configure(level="info", style="json", service="one")
    logger.info("a.first")
    log.configure(level="error", style="json", service="two")
    logger.info("a.second")
    logger.error("a.third")
    assert [(line["event"], line["service"]) for line in lines(capsys)] == [("a.first", "one"), ("a.third", "two")]


def test_the_request_id_is_on_every_line_of_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(level="info", style="json", service="decode")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.get().info("a.b")
    log.get().info("c.d")
    first, second = lines(capsys)
    assert first["request_id"] == "r1"
    assert "request_id" not in second


def test_a_line_s_own_key_wins(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(level="info", style="json", service="decode")
    log.get().info("a.b", service="another")
    assert lines(capsys)[0]["service"] == "another"


def test_an_exception_is_part_of_its_line_without_the_variables(capsys: pytest.CaptureFixture[str]) -> None:
    """A frame's variables are prompts and secrets."""
    log.configure(level="info", style="json")

    def fail(password: str) -> None:
        raise ValueError("it broke")

    try:
        fail("the-cluster's-secret")
    except ValueError:
        log.get().exception("step.failed")
    captured = capsys.readouterr().err
    (line,) = [json.loads(text) for text in captured.splitlines()]
    assert line["exception"][0]["exc_type"] == "ValueError"
    assert line["exception"][0]["exc_value"] == "it broke"
    assert [frame["name"] for frame in line["exception"][0]["frames"]][-1] == "fail"
    assert "the-cluster's-secret" not in captured


def test_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(level="info", style="console", service="decode")
    log.get().warning("lease.expired", held_s=1.5)
    text = capsys.readouterr().err
    assert "lease.expired" in text
    assert "held_s" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_the_standard_library_is_left_alone() -> None:
    before = logging.getLogger().handlers[:]
    log.configure(level="info", style="json")
    assert logging.getLogger().handlers == before
