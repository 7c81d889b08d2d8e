"""A plan drawn: a PNG, or a page of HTML with the drawing and the words."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.placement.curves import Curve
from zipserve.planner.placement.report import as_text, objective_text
from zipserve.planner.placement.search import Question, Ranking

_SUFFIXES = (".png", ".html")


def check_path(path: Path) -> None:
    """Raises InvalidRequestError if such a report cannot be written."""
    if path.suffix not in _SUFFIXES:
        raise InvalidRequestError(f"report {path}: its name must end with {' or '.join(_SUFFIXES)}", field="report")


def save(path: Path, ranking: Ranking, question: Question, curves: Sequence[Curve]) -> None:
    """Writes the report.

    Raises:
        InvalidRequestError: see `check_path`.
    """
    check_path(path)
    drawing = _drawing(question, curves)
    if path.suffix == ".png":
        path.write_bytes(drawing)
        return
    picture = base64.b64encode(drawing).decode()
    path.write_text(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><title>zipserve plan</title>\n"
        "<style>body{font-family:sans-serif;margin:2em}pre{overflow-x:auto}img{max-width:100%}</style>\n"
        f"<pre>{html.escape(as_text(ranking, question))}</pre>\n"
        f'<img alt="Share of the requests within the limits, by rate" src="data:image/png;base64,{picture}">\n</html>\n'
    )


def _drawing(question: Question, curves: Sequence[Curve]) -> bytes:
    from matplotlib.figure import Figure  # noqa: PLC0415  only reports need it

    objectives = question.slo.objectives
    figure = Figure(figsize=(7.0 * len(objectives), 4.5), layout="constrained")
    for row, objective in enumerate(objectives):
        axes = figure.add_subplot(1, len(objectives), row + 1)
        for one in curves:
            axes.plot(one.rates, 100 * one.attained[row], marker="o", label=str(one.candidate))
        axes.axhline(100 * objective.share, color="grey", linestyle="--", linewidth=1)
        axes.set(xlabel="requests per second", ylabel="within the limits [%]", ylim=(0, 102))
        axes.set_title(objective_text(objective), fontsize="small")
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
