"""Attainment against rate, in the form of DistServe's Figures 8 and 9: a curve for each arrangement."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zipserve.bench.goodput.search import Goodput, Point, fitted

_PARTS = {"joint": "all objectives", "ttft": "TTFT", "tpot": "TPOT", "gap": "every gap"}


def save(
    path: Path,
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
    goodputs: Mapping[str, tuple[int, Goodput]],
    attain: float,
    title: str,
) -> None:
    """Writes a PNG: shares that keep all objectives and each one, over requests per second and device.

    Args:
        figures: of the runs of each arrangement.
        goodputs: devices and goodput of each; a vertical line.
        attain: the share that counts; a horizontal line.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  of the extra `bench`, and only with --plot

    figure = Figure(figsize=(4 * len(_PARTS), 4), layout="constrained")
    figure.suptitle(title)
    for place, (part, name) in enumerate(_PARTS.items(), 1):
        axes = figure.add_subplot(1, len(_PARTS), place)
        for number, (who, runs) in enumerate(figures.items()):
            devices, goodput = goodputs[who]
            colour = f"C{number}"
            points = fitted(
                Point(run["rate"], run["attained"][part] * run["requests"], run["requests"]) for run in runs
            )
            axes.plot(
                [point.rate / devices for point in points],
                [point.share * 100 for point in points],
                marker="o", color=colour, label=who,
            )  # fmt: skip
            if part == "joint" and goodput.rate:
                axes.axvline(goodput.rate / devices, color=colour, linestyle=":")
        axes.axhline(attain * 100, color="grey", linestyle="--")
        axes.set(title=name, xlabel="requests per second and device", ylim=(0, 105))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("requests that keep it [%]")
    figure.axes[0].legend()
    figure.savefig(path, format="png")
