"""Workloads from the log of a router: what was asked of it, as it came (docs/logging.md)."""

import heapq
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
    """Requests per second that came, also those that were refused."""


def read_log(path: Path, requests: int | None = None) -> Logged:
    """Requests in the order of their arrival. What was not answered has the lengths of others that were.

    Args:
        requests: only the last so many.

    Raises:
        InvalidRequestError: the file cannot be read, or tells of fewer than two requests, or of none that was answered.
    """
    if requests is not None and requests < 2:
        raise InvalidRequestError(f"{requests} requests of a log are too few, 2 are needed", field="requests")
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            rows = heapq.nlargest(requests or _REQUESTS_MAX, (row for row in map(_row, _events(file)) if row))
    except OSError as error:
        raise InvalidRequestError(f"log {path}: {error}", field="log") from error
    answered = [row for row in rows if row[1]]
    if len(rows) < 2 or not answered:
        raise InvalidRequestError(
            f"log {path} tells of {len(rows)} requests, {len(answered)} of them answered; 2 and 1 are needed",
            field="log",
        )
    others = np.random.default_rng(0).integers(0, len(answered), len(rows))
    like = [row if row[1] else (row[0], *answered[other][1:]) for row, other in zip(rows, others, strict=True)]
    arrived_s, prompts, outputs, cached = np.array(like[::-1], np.float64).T
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
    """Arrival in s, tokens of the prompt, tokens of an answer after its first (at least 1), cached tokens; these are 0
    where there was no answer. None if it is no such event."""
    try:
        arrived_s = datetime.fromisoformat(event["timestamp"]).timestamp() - event["seconds"]
        if event["outcome"] != "OK":
            return arrived_s, 0, 0, 0
        outputs = max(int(event["completion_tokens"]) // int(event["choices"]) - 1, 1)
        return arrived_s, int(event["prompt_tokens"]), outputs, int(event["cached_tokens"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
