"""How every benchmark ends: its bars as a table, for a program as one line of JSON, and as the exit status."""

import argparse
import json
import math
import operator
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

_PACKAGES = ("zipserve", "torch", "transformers", "triton")
_HOLDS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Check:
    """One bar: a measured value and the bound that it must keep."""

    name: str
    value: float
    relation: Literal["<=", ">="]
    bound: float
    decides: bool = True
    """Whether the exit status depends on it. What a smoke run measures says little, and is told only."""

    @property
    def met(self) -> bool:
        """NaN, as of something that was not measured, meets nothing."""
        return bool(_HOLDS[self.relation](self.value, self.bound))


def options(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(f"zipserve bench {name}", description=description)
    parser.add_argument("--quick", action="store_true", help="smoke run: little is measured, and does not decide")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def whole(least: int) -> Callable[[str], int]:
    """For argparse: the type of options that take a whole number from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return parse


def above_0(text: str) -> float:
    """For argparse: the type of options that take a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def finish(name: str, checks: Sequence[Check], *, device: str, as_json: bool, **details: Any) -> int:
    """Prints the bars, and as the last line of stdout, where wanted, one JSON object with them and `details`.

    Returns:
        The exit status: 1 if a bar that decides is not met.
    """
    print(table(("bar", "value", "bound", "met"), (_row(check) for check in checks)))
    if as_json:
        bars = [
            {
                "name": check.name,
                "value": check.value,
                "relation": check.relation,
                "bound": check.bound,
                "met": check.met,
                "decides": check.decides,
            }
            for check in checks
        ]
        found = {"benchmark": name, "checks": bars, "commit": commit(), "device": device, "versions": versions()}
        print(dumps({**found, **details}))
    sys.stdout.flush()
    return int(any(check.decides and not check.met for check in checks))


def dumps(value: Any) -> str:
    """One line of JSON; null stands for numbers that are not finite, which JSON does not know."""
    return json.dumps(_without_nan(value), allow_nan=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def progress(message: str) -> None:
    """Tells on stderr how far the benchmark is."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def commit() -> str | None:
    """The commit that this code is of, with `-dirty` if files have changed since; None outside of a checkout."""
    folder = Path(__file__).parent
    # An installed package may lie in somebody else's checkout.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose code is measured."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu(threads: int) -> str:
    """This machine's processor in words, and the threads that were used."""
    model = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {threads} threads of {len(os.sched_getaffinity(0))} cores"


def _row(check: Check) -> tuple[str, str, str, str]:
    met = "yes" if check.met else "NO"
    bound = f"{check.relation} {check.bound:g}"
    return check.name, f"{check.value:.4g}", bound, met if check.decides else f"({met.lower()})"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
