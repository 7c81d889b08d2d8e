"""What was measured, for a person to read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zipserve.bench import report
from zipserve.bench.goodput.search import Goodput

_QUANTILES = ("p50", "p90", "p99")


def of_runs(figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line for each run, by arrangement and rate: shares that keep the objectives, and times."""
    head = (
        "arrangement", "req/s", "joint", "TTFT", "TPOT", "gaps", "TTFT s p50/p90/p99", "TPOT ms p50/p90/p99",
        "gap ms p50/p90/p99/max", "largest gap ms p50/p90", "failed",
    )  # fmt: skip
    return report.table(head, (_line(name, run) for name, runs in figures.items() for run in _by_rate(runs)))


def of_goodputs(found: Mapping[str, tuple[int, Goodput]]) -> str:
    """A line for each arrangement: its devices and its goodput."""
    rows = [
        (name, str(devices), _rate(goodput), f"{goodput.rate / devices:.3f}", _bracket(goodput))
        for name, (devices, goodput) in found.items()
    ]
    return report.table(("arrangement", "devices", "goodput req/s", "per device", "between"), rows)


def _by_rate(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(runs, key=lambda run: (run["rate"], run["repeat"]))


def _line(name: str, run: Mapping[str, Any]) -> tuple[str, ...]:
    shares = run["attained"]
    return (
        name,
        f"{run['rate']:.3f}",
        *(f"{shares[part]:.1%}" for part in ("joint", "ttft", "tpot", "gap")),
        _times(run["ttft_ms"], _QUANTILES, 1e-3, 2),
        _times(run["tpot_ms"], _QUANTILES),
        _times(run["gap_ms"], (*_QUANTILES, "max")),
        _times(run["largest_gap_ms"], _QUANTILES[:2]),
        str(run["failed"]),
    )


def _times(quantiles: Mapping[str, float], names: Iterable[str], scale: float = 1.0, digits: int = 0) -> str:
    return " / ".join(f"{quantiles[name] * scale:.{digits}f}" for name in names)


def _rate(goodput: Goodput) -> str:
    return f"{'≥ ' if math.isinf(goodput.below) and goodput.rate else ''}{goodput.rate:.3f}"


def _bracket(goodput: Goodput) -> str:
    return "no rate falls short" if math.isinf(goodput.below) else f"{goodput.rate:.3f} … {goodput.below:.3f}"
