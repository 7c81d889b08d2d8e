"""Workloads from the log of a router: what was asked of it, as it came (docs/logging.md)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.traffic import Traffic, traffic
from zipserve.planner.workload import workload

_REQUESTS_MAX = 1_000_000


@dataclass(frozen=True, eq=False)
class Logged:
    """What a router was asked for."""

    traffic: Traffic
    """With its own gaps, in units of the mean gap."""
    rate: float
    """Requests per second."""


def read_log(path: Path, requests: int | None = None) -> Logged:
    """Requests that were answered, in the order of their arrival.

    Args:
        requests: only the last so many.

    Raises:
        InvalidRequestError: the file cannot be read, or tells of fewer than two requests.
    """
    try:
        with path.open() as file:
            rows = sorted(row for row in map(_row, _events(file)) if row is not None)
    except OSError as error:
        raise InvalidRequestError(f"log {path}: {error}", field="log") from error
    rows = rows[-(requests or _REQUESTS_MAX) :]
    if len(rows) < 2:
        raise InvalidRequestError(f"log {path} tells of {len(rows)} answered requests, 2 are needed", field="log")
    arrived_s, prompts, outputs, cached = np.array(rows, np.float64).T
    gaps = np.diff(arrived_s, prepend=arrived_s[0])
    mean_s = float(gaps[1:].mean())
    if not mean_s > 0:
        raise InvalidRequestError(f"log {path}: all its requests came at once, they have no rate", field="log")
    return Logged(traffic(workload(prompts, outputs, gaps / mean_s), np.minimum(cached, prompts - 1)), 1 / mean_s)


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Of finished requests; other lines may be anything."""
    for line in lines:
        if '"request.finished"' not in line:
            continue
        try:
            event = json.loads(line[line.index("{") :])
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "request.finished":
            yield event


def _row(event: dict[str, Any]) -> tuple[float, int, int, int] | None:
    """Arrival in s, tokens of the prompt, tokens of an answer after its first, cached tokens; None if there was no
    whole answer of two tokens or more."""
    if event.get("outcome") != "OK":
        return None
    try:
        outputs = event["completion_tokens"] // event["choices"] - 1
        arrived_s = datetime.fromisoformat(event["timestamp"]).timestamp() - event["seconds"]
        row = arrived_s, int(event["prompt_tokens"]), int(outputs), int(event["cached_tokens"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return row if row[1] >= 1 and row[2] >= 1 else None
