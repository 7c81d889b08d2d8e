"""Distributions of a run as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from zipserve.bench.serve.records import Objective, Record


def save(path: Path, records: Sequence[Record], objective: Objective, title: str) -> None:
    """Writes a PNG with the shares of requests below each TTFT and TPOT, and the objectives as lines."""
    from matplotlib.figure import Figure  # noqa: PLC0415  of the extra `bench`, and only with --plot

    done = [record for record in records if not record.error]
    parts = (
        ("time to first token", [record.ttft_s for record in done], objective.ttft_s),
        ("time per token", [record.tpot_s for record in done], objective.tpot_s),
    )
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for place, (name, seconds, limit_s) in enumerate(parts, 1):
        axes = figure.add_subplot(1, len(parts), place)
        milliseconds = sorted(value * 1e3 for value in seconds if not math.isnan(value))
        shares = [(i + 1) / len(milliseconds) for i in range(len(milliseconds))]
        axes.step(milliseconds, shares, where="post")
        if limit_s is not None:
            axes.axvline(limit_s * 1e3, color="tab:red", linestyle="--", label=f"objective: {limit_s * 1e3:g} ms")
            axes.legend()
        axes.set(xlabel=f"{name} [ms]", ylabel="share of requests", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
