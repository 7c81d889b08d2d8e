"""The reference data of tests/data/planner as the planner's objects."""

import csv
import functools
import json
from pathlib import Path
from typing import Any

from zipserve.planner.command import read_profile
from zipserve.planner.latency import COLOCATED, DISAGGREGATED, Profile
from zipserve.planner.simulation import Placement
from zipserve.planner.trace import read_trace
from zipserve.planner.workload import Workload

DATA = Path(__file__).parents[1] / "data/planner"
PROFILE_PATH = DATA / "profile_a100.json"


@functools.cache
def profile() -> Profile:
    return read_profile(PROFILE_PATH)


@functools.cache
def trace(name: str, arrivals: str, requests: int) -> Workload:
    return read_trace(DATA / f"traces/{name}.csv", arrivals, requests, seed=0)


def placement(model: str, backend: str, config: list[int]) -> Placement:
    """From the published notation, with or without its first number, the segments."""
    known = profile().model(model)
    if backend == "vllm":
        return Placement(None, None, known.instance(COLOCATED, *config))
    segments, tensor, pipeline, decode_tensor, decode_pipeline = config if len(config) == 5 else [1, *config]
    return Placement(
        known.instance(DISAGGREGATED, tensor, segments * pipeline),
        known.instance(DISAGGREGATED, decode_tensor, segments * decode_pipeline),
        segments=segments,
    )


def load(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def golden_times(run: str) -> tuple[list[float], list[float]]:
    with (DATA / f"golden/{run}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row["ttft_ms"]) for row in rows], [float(row["tpot_ms"]) for row in rows]
