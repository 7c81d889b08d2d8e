"""How benchmarks end: bars, table, JSON, exit status; and how they are started."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from zipserve.bench import __main__ as bench
from zipserve.bench import report
from zipserve.bench.report import Check
from zipserve.cli.__main__ import main as zipserve

MET = Check("time", 2.0, "<=", 2.0)
MISSED = Check("share", 0.5, ">=", 0.75)


@pytest.mark.parametrize(
    ("value", "relation", "met"),
    [(1.0, "<=", True), (2.0, "<=", True), (2.1, "<=", False), (2.0, ">=", True), (1.9, ">=", False),
     (math.nan, "<=", False), (math.nan, ">=", False), (math.inf, "<=", False), (math.inf, ">=", True)],
)  # fmt: skip
def test_bar(value: float, relation: str, met: bool) -> None:
    assert Check("a", value, relation, 2.0).met is met  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("checks", "status"),
    [([], 0), ([MET], 0), ([MET, MISSED], 1), ([MET, Check("share", 0.5, ">=", 0.75, decides=False)], 0)],
)
def test_exit_status(checks: list[Check], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.finish("a", checks, device="d", as_json=False) == status
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(checks)


def test_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    report.finish("kl", [MET, Check("b", math.nan, ">=", 1.0)], device="a CPU", as_json=True, more={"x": [math.inf, 1]})
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["checks"] == [
        {"name": "time", "value": 2.0, "relation": "<=", "bound": 2.0, "met": True, "decides": True},
        {"name": "b", "value": None, "relation": ">=", "bound": 1.0, "met": False, "decides": True},
    ]
    assert (found["benchmark"], found["device"], found["more"]) == ("kl", "a CPU", {"x": [None, 1]})
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "commit" in found


def test_table_of_bars(capsys: pytest.CaptureFixture[str]) -> None:
    report.finish("a", [MET, Check("share", 0.5, ">=", 0.75, decides=False)], device="", as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "bar    value    bound   met",
        "time       2     <= 2   yes",
        "share    0.5  >= 0.75  (no)",
    ]


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "report.py"
    file.write_text("1")
    monkeypatch.setattr(report, "__file__", str(file))
    assert report.commit() is None, "no checkout"
    git("init")
    assert report.commit() is None, "somebody else's checkout"
    git("add", "report.py")
    git("commit", "-m", "m")
    assert report.commit() == git("rev-parse", "HEAD")
    file.write_text("2")
    assert report.commit() == f"{git('rev-parse', 'HEAD')}-dirty"


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("20", 20), ("0", None), ("-1", None), ("1.5", None)])
def test_whole_numbers(text: str, value: int | None) -> None:
    parse = report.whole(1)
    if value is not None:
        assert parse(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 on"):
        parse(text)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_list_of_benchmarks(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 0
    assert "quality" in capsys.readouterr().out


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["speed"]) == 2
    assert "no benchmark 'speed'; there are: quality" in capsys.readouterr().err


def test_what_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["quality", "--model", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["quality"], ["quality", "--json", "--texts", "a"], ["quality", "--help"]],
)
def test_command_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert zipserve(["bench", *arguments]) == 1
    assert commands == [[sys.executable, "-P", "-m", "zipserve.bench", *arguments]]


def test_killed_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9))
    assert zipserve(["bench", "quality"]) == 128 + 9


def test_installation_without_benchmarks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert zipserve(["bench"]) == 2
    assert "no benchmarks" in capsys.readouterr().err
