"""One arrangement at one rate: what each request saw, and what that comes to."""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from zipserve.bench.goodput.contestants import Connect
from zipserve.bench.goodput.search import Point
from zipserve.bench.goodput.workloads import Workload, mean_rate
from zipserve.bench.serve import arrivals as schedule
from zipserve.bench.serve.arrivals import Arrival
from zipserve.bench.serve.drive import drive, warm_up
from zipserve.bench.serve.records import QUANTILES, Objective, Record, quantile
from zipserve.common.errors import InvalidRequestError


@dataclass(frozen=True)
class Load:
    """What is sent in every run."""

    workload: Workload
    requests: int
    """That count."""
    edge: int
    """Requests before and after these, which do not: those that count find the server busy, and leave it busy."""
    vocab_tokens: int
    seed: int

    def run(self, rate: float, repeat: int = 0) -> tuple[list[Arrival], list[list[int]]]:
        """Arrivals and prompts of a run; its `repeat` at the same rate has others."""
        draw = f"{self.seed}, {repeat}"
        due = self.arrivals(rate, draw)
        return due, self.prompts(due, f"{draw}, {rate:.6g}")

    def arrivals(self, rate: float, seed: str) -> list[Arrival]:
        """Of one run."""
        return self.workload.arrivals(self.requests + 2 * self.edge, rate, seed)

    def prompts(self, due: Sequence[Arrival], seed: str) -> list[list[int]]:
        """Random ids, which no other seed has."""
        return schedule.prompts(due, (), self.vocab_tokens, random.Random(f"{seed}, prompts"))  # noqa: S311


@dataclass(frozen=True)
class Run:
    """Requests at one rate."""

    rate: float
    repeat: int
    arrivals: Sequence[Arrival]
    records: Sequence[Record]
    """Of each arrival."""
    edge: int

    @property
    def counted(self) -> Sequence[Record]:
        """Without those at its edges."""
        return self.records[self.edge : len(self.records) - self.edge]

    def point(self, objective: Objective) -> Point:
        """How many kept it."""
        return Point(self.rate, sum(objective.kept(record) for record in self.counted), len(self.counted))


async def warmed_up(connect: Connect, load: Load, count: int) -> None:
    """Sends requests one after the other, before anything counts.

    Raises:
        InvalidRequestError: one failed.
    """
    due = list(itertools.islice(itertools.cycle(load.arrivals(1.0, "warm-up")), count))
    async with connect() as ask:
        records = await warm_up(ask, due, load.prompts(due, f"{load.seed}, warm-up"))
    _mark_short(due, records)
    for record in records:
        if record.error:
            raise InvalidRequestError(f"a request before the start failed: {record.error}")


async def run(connect: Connect, load: Load, rate: float, repeat: int = 0) -> Run:
    """Sends all requests of a run when they are due, and waits for the last answer."""
    due, prompts = load.run(rate, repeat)
    async with connect() as ask:
        records = await drive(ask, due, prompts)
    _mark_short(due, records)
    return Run(rate, repeat, due, records, load.edge)


def _mark_short(due: Sequence[Arrival], records: Sequence[Record]) -> None:
    """Answers with fewer tokens than were asked for have failed: they took less time than others."""
    for arrival, record in zip(due, records, strict=True):
        if not record.error and record.tokens < arrival.output_tokens:
            record.error = f"SHORT: {record.tokens} of {arrival.output_tokens} tokens"


def attained(records: Sequence[Record], objective: Objective) -> dict[str, float]:
    """The share of requests that keep each objective by itself, and all of them (`joint`)."""
    alone = {
        "ttft": Objective(ttft_s=objective.ttft_s),
        "tpot": Objective(tpot_s=objective.tpot_s),
        "gap": Objective(gap_s=objective.gap_s),
        "joint": objective,
    }
    return {name: sum(one.kept(record) for record in records) / len(records) for name, one in alone.items()}


def figures(run: Run, objective: Objective) -> dict[str, Any]:
    """Shares, and quantiles in milliseconds, over the requests of a run that count."""
    done = [record for record in run.counted if not record.error]
    return {
        "rate": run.rate,
        "rate_sent": mean_rate([record.sent_s for record in run.records]),
        "repeat": run.repeat,
        "requests": len(run.counted),
        "failed": len(run.counted) - len(done),
        "attained": attained(run.counted, objective),
        "ttft_ms": _quantiles(record.ttft_s for record in done),
        "tpot_ms": _quantiles(record.tpot_s for record in done),
        "gap_ms": _quantiles(gap for record in done for gap in record.gaps_s()),
        "largest_gap_ms": _quantiles(record.largest_gap_s for record in done),
        "e2e_ms": _quantiles(record.e2e_s for record in done),
        "lag_ms": _quantiles(record.lag_s for record in run.records),
    }


def details(run: Run, objective: Objective) -> list[dict[str, Any]]:
    """Each request by itself, in milliseconds, those at the edges too."""
    last = len(run.records) - run.edge
    return [
        {
            "arrival_ms": _ms(due.at_s),
            "prompt_tokens": due.prompt_tokens,
            "output_tokens": due.output_tokens,
            "tokens": record.tokens,
            "ttft_ms": _ms(record.ttft_s),
            "tpot_ms": _ms(record.tpot_s),
            "largest_gap_ms": _ms(record.largest_gap_s),
            "e2e_ms": _ms(record.e2e_s),
            "gaps_ms": [_ms(gap) for gap in record.gaps_s()],
            "error": record.error,
            "server": {name: round(seconds, 6) for name, seconds in record.server.items()},
            "counted": run.edge <= index < last,
            "kept": objective.kept(record),
        }
        for index, (due, record) in enumerate(zip(run.arrivals, run.records, strict=True))
    ]


def _quantiles(seconds: Iterable[float]) -> dict[str, float]:
    found = list(seconds)
    quantiles = {f"p{q * 100:g}": quantile(found, q) * 1e3 for q in QUANTILES}
    return {**quantiles, "max": quantile(found, 1.0) * 1e3}


def _ms(seconds: float) -> float:
    return seconds if math.isnan(seconds) else round(seconds * 1e3, 3)
