"""Workloads from trace files, CSV with a header or JSON lines, and from distributions."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.workload import Workload, workload

ARRIVALS = ("poisson", "gamma", "replay")
GAMMA_CV2 = 2.0
"""Squared coefficient of variation of gamma arrivals: 1 would be Poisson."""
_UNIT_GAPS = {"poisson": "unit_gap_poisson", "gamma": "unit_gap_gamma_cv2"}
_ROWS_MAX = 1_000_000

LENGTHS: Mapping[str, tuple[float, float, float, float]] = {
    "sharegpt": (6.682226762874304, 0.85, 4.938100022425448, 1.0),
    "humaneval": (5.0405099263271484, 0.45, 4.340229942543632, 0.7),
}
"""Log-normal lengths like those of public data sets: mean and deviation of the logarithm, of prompts and of answers."""
_TOTAL_TOKENS_MAX = 2048
_LENGTHS_MIN = 4


def read_trace(path: Path, arrivals: str, requests: int | None, seed: int) -> Workload:
    """Lengths, and where it has them gaps, of a trace.

    A row has `prompt_len` and `output_len`. `replay` takes the gaps from `arrival_ms` or `gap_ms`; the other arrivals
    from the trace's own column of unit gaps, if there is one, and are drawn if not.

    Args:
        requests: how many, from the first on; None: all.

    Raises:
        InvalidRequestError: the file cannot be read, or is no such trace.
    """
    rows = _rows(path)
    prompts, outputs = _column(rows, "prompt_len"), _column(rows, "output_len")
    gaps: ArrayLike
    if arrivals == "replay":
        gaps = _replayed(rows)
    elif _UNIT_GAPS[arrivals] in rows[0]:
        gaps = _column(rows, _UNIT_GAPS[arrivals])
    else:
        gaps = draw_gaps(arrivals, len(rows), np.random.default_rng(seed))
    found = workload(prompts, outputs, gaps)
    return found if requests is None else found.first(requests)


def draw(name: str, arrivals: str, requests: int, seed: int) -> Workload:
    """A workload of a distribution: one of `LENGTHS`, or `fixed:PROMPT,OUTPUT`.

    Raises:
        InvalidRequestError: there is no such distribution, or arrivals are to be replayed.
    """
    if not 1 <= requests <= _ROWS_MAX:
        raise InvalidRequestError(f"{requests} requests are not in [1, {_ROWS_MAX}]", field="requests")
    random = np.random.default_rng(seed)
    kind, _, sizes = name.partition(":")
    if kind == "fixed":
        prompt, _, output = sizes.partition(",")
        if not (prompt.isdecimal() and output.isdecimal()):
            raise InvalidRequestError(f"{name!r} is not of the form fixed:PROMPT,OUTPUT", field="distribution")
        prompts, outputs = np.full(requests, int(prompt)), np.full(requests, int(output))
    elif name in LENGTHS:
        prompts, outputs = _lognormal(LENGTHS[name], requests, random)
    else:
        raise InvalidRequestError(
            f"no distribution {name!r}; there are: {', '.join(LENGTHS)}, fixed:PROMPT,OUTPUT", field="distribution"
        )
    return workload(prompts, outputs, draw_gaps(arrivals, requests, random))


def draw_gaps(arrivals: str, requests: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Gaps of mean 1, the first one 0."""
    if arrivals == "poisson":
        gaps = random.exponential(1.0, requests)
    elif arrivals == "gamma":
        gaps = random.gamma(1 / GAMMA_CV2, GAMMA_CV2, requests)
    else:
        raise InvalidRequestError(f"{arrivals!r} arrivals cannot be drawn, only poisson and gamma", field="arrivals")
    gaps[0] = 0.0
    return gaps


def _lognormal(
    shape: tuple[float, float, float, float], requests: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs are drawn again that are too long together, or short both."""
    prompt_mean, prompt_deviation, output_mean, output_deviation = shape
    kept = np.zeros((0, 2), np.int64)
    while len(kept) < requests:
        prompts = random.lognormal(prompt_mean, prompt_deviation, requests)
        outputs = random.lognormal(output_mean, output_deviation, requests)
        pairs = np.maximum(np.stack([prompts, outputs], axis=1).astype(np.int64), 1)
        fits = (pairs.sum(axis=1) < _TOTAL_TOKENS_MAX) & (pairs.max(axis=1) >= _LENGTHS_MIN)
        kept = np.concatenate([kept, pairs[fits]])
    return kept[:requests, 0], kept[:requests, 1]


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        with path.open(newline="") as file:
            if path.suffix in (".jsonl", ".ndjson"):
                rows: list[Mapping[str, Any]] = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"trace {path}: {error}", field="trace") from error
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise InvalidRequestError(f"trace {path}: it has no rows of named fields", field="trace")
    if len(rows) > _ROWS_MAX:
        raise InvalidRequestError(f"trace {path}: {len(rows)} rows, at most {_ROWS_MAX}", field="trace")
    return rows


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = []
    for number, row in enumerate(rows):
        try:
            values.append(float(row[name]))
        except (KeyError, TypeError, ValueError):
            raise InvalidRequestError(
                f"trace: {name} of request {number} is {row.get(name)!r}, not a number", field="trace"
            ) from None
    return values


def _replayed(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The trace's own gaps in units of their mean, the first one 0."""
    if "arrival_ms" in rows[0]:
        gaps = np.diff(_column(rows, "arrival_ms"), prepend=np.nan)
    elif "gap_ms" in rows[0]:
        gaps = np.array(_column(rows, "gap_ms"))
    else:
        raise InvalidRequestError("trace: replay needs a column arrival_ms or gap_ms", field="trace")
    gaps[0] = 0.0
    mean = gaps.mean() * len(gaps) / max(len(gaps) - 1, 1)
    return gaps / mean if mean > 0 else gaps
