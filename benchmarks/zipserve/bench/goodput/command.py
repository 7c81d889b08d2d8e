"""`zipserve bench goodput`: which arrangement of the same cores bears the most requests within the objectives."""

import argparse
import asyncio
import json
import os
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zipserve.bench import report
from zipserve.bench.engine.vllm import preloaded
from zipserve.bench.goodput import arrangements, bars, plot, runs, table, workloads
from zipserve.bench.goodput.contestants import Connect, Contestant, Zipserve
from zipserve.bench.goodput.runs import Load, Run
from zipserve.bench.goodput.search import Goodput, Search, goodput, repeats
from zipserve.bench.goodput.vllm import Vllm
from zipserve.bench.serve.records import Objective
from zipserve.common import models
from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC
from zipserve.common.models import ModelFiles

_ARRANGEMENTS = ("replicas", "apart")
_QUICK_RATE = 4.0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("goodput", "The rate that each arrangement of the same cores bears within objectives.")
    options.add_argument(
        "--arrangements", nargs="*", default=_ARRANGEMENTS, metavar="A",
        help="replicas (a worker a core, each does all), whole (one worker with all cores), apart (one prefill worker, "
        "a core for each), or a variant, NAME:FIELD=VALUE,… (default: replicas apart)",
    )  # fmt: skip
    options.add_argument("--plan", type=Path, metavar="JSON", help="and the arrangement of this file")
    options.add_argument("--rival", choices=("vllm",), help="and vLLM, from another environment")
    options.add_argument("--rival-python", type=Path, metavar="PATH", help="the interpreter of that environment")
    options.add_argument(
        "--rival-arrangements", nargs="+", default=("whole", "replicas", "apart"), metavar="A",
        help="whole, replicas, apart, or with another chunk size, NAME:TOKENS (default: whole replicas apart)",
    )  # fmt: skip
    options.add_argument("--model", default=models.DEFAULT_MODEL, help="folder or Hugging Face id (default: SmolLM2)")
    options.add_argument("--codec", choices=CODECS, default=DEFAULT_CODEC, help=f"of KV (default: {DEFAULT_CODEC})")
    options.add_argument(
        "--sequences", type=report.whole(1), default=16, metavar="N",
        help="most at once, of each worker and each instance of vLLM, unless an arrangement says else (default: 16)",
    )  # fmt: skip
    options.add_argument(
        "--workload", default="rival", metavar="W",
        help=f"{', '.join(workloads.MIXES)}, or a trace as `bench serve` reads them (default: rival)",
    )  # fmt: skip
    options.add_argument("--rates", nargs="+", type=report.above_0, metavar="R", help="(default: they are searched)")
    options.add_argument(
        "--start-rate", type=report.above_0, default=0.4, metavar="R", help="of the search, per second (default: 0.4)"
    )
    options.add_argument("--runs", type=report.whole(1), default=10, metavar="N", help="most of a search (default: 10)")
    options.add_argument("--requests", type=report.whole(1), metavar="N", help="of a run that count (default: 40)")
    options.add_argument(
        "--edge", type=report.whole(0), metavar="N", help="before and after these, which do not count (default: 4)"
    )
    options.add_argument(
        "--warm-up", type=report.whole(0), default=4, metavar="N",
        help="requests before, at least one for each instance (default: 4)",
    )  # fmt: skip
    options.add_argument("--seed", type=int, default=1, help="of arrivals, lengths and prompts (default: 1)")
    options.add_argument("--slo-ttft-ms", type=report.above_0, default=4000.0, metavar="MS", help="(default: 4000)")
    options.add_argument("--slo-tpot-ms", type=report.above_0, default=200.0, metavar="MS", help="(default: 200)")
    options.add_argument("--slo-gap-ms", type=report.above_0, default=350.0, metavar="MS", help="(default: 350)")
    options.add_argument(
        "--attain", type=float, default=0.9, metavar="SHARE", help="of requests that must keep all three (default: 0.9)"
    )
    options.add_argument("--timeout", type=report.above_0, default=600.0, metavar="S", help="of a request")
    options.add_argument("--plot", type=Path, metavar="PNG", help="draw attainment against rate")
    options.add_argument("--save", type=Path, metavar="JSON", help="everything, also each request by itself")
    return options


@dataclass
class _Found:
    """Of one contestant."""

    devices: int
    goodput: Goodput = field(default_factory=lambda: Goodput(0.0, 0.0))
    runs: list[Run] = field(default_factory=list)


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status.

    Raises:
        InvalidRequestError: an arrangement, a workload or a rival cannot be served.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever was started is ended, as with Ctrl-C
    files = models.resolve(options.model)
    workload = workloads.named(options.workload)
    few = options.quick
    load = Load(
        workload,
        requests=options.requests or (4 if few else 40),
        edge=(1 if few else 4) if options.edge is None else options.edge,
        vocab_tokens=json.loads((files.folder / "config.json").read_text())["vocab_size"],
        seed=options.seed,
    )
    rates = options.rates or ([_QUICK_RATE] if few else [])
    objective = Objective(options.slo_ttft_ms / 1e3, options.slo_tpot_ms / 1e3, options.slo_gap_ms / 1e3)
    found: dict[str, _Found] = {}
    for contestant in _contestants(options, files):
        report.progress(f"{contestant.name} starts")
        with contestant.served() as connect:
            asyncio.run(runs.warmed_up(connect, load, max(options.warm_up, contestant.instances)))
            mine = found[contestant.name] = _Found(contestant.devices)
            if rates:
                mine.runs = [_measure(contestant, connect, load, objective, *each) for each in repeats(rates)]
                mine.goodput = goodput([run.point(objective) for run in mine.runs], options.attain)
            else:
                _search(mine, contestant, connect, load, objective, options)
    return _finish(options, files, objective, found)


def _contestants(options: argparse.Namespace, files: ModelFiles) -> list[Contestant]:
    cores = len(os.sched_getaffinity(0))
    wanted = [arrangements.parse(text, cores) for text in options.arrangements]
    if options.plan:
        wanted.append(arrangements.read_plan(options.plan))
    for arrangement in wanted:
        arrangement.cores(range(cores))  # before the first one starts
    found: list[Contestant] = [
        Zipserve(arrangement, options.model, options.codec, options.sequences, options.timeout)
        for arrangement in wanted
    ]
    if options.rival:
        if options.rival_python is None:
            raise InvalidRequestError("rival vllm needs --rival-python", field="rival-python")
        found += [
            Vllm.parse(text, options.rival_python, files, options.sequences, options.timeout)
            for text in options.rival_arrangements
        ]
    return found


def _measure(
    contestant: Contestant, connect: Connect, load: Load, objective: Objective, rate: float, repeat: int
) -> Run:
    measured = asyncio.run(runs.run(connect, load, rate, repeat))
    shares = runs.attained(measured.counted, objective)
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    report.progress(f"{contestant.name} at {rate:.3f} requests/s: {told}")
    return measured


def _search(
    mine: _Found,
    contestant: Contestant,
    connect: Connect,
    load: Load,
    objective: Objective,
    options: argparse.Namespace,
) -> None:
    search = Search(options.attain, options.start_rate, runs_max=options.runs)
    while (following := search.next()) is not None:
        rate, repeat = following
        measured = _measure(contestant, connect, load, objective, rate, repeat)
        mine.runs.append(measured)
        point = measured.point(objective)
        search.add(point.kept, point.requests)
    mine.goodput = goodput(search.points, options.attain)


def _finish(options: argparse.Namespace, files: ModelFiles, objective: Objective, found: dict[str, _Found]) -> int:
    figures = {name: [runs.figures(run, objective) for run in mine.runs] for name, mine in found.items()}
    goodputs = {name: (mine.devices, mine.goodput) for name, mine in found.items()}
    print(table.of_runs(figures), end="\n\n")
    print(table.of_goodputs(goodputs), end="\n\n")
    cores = report.cpu(max((mine.devices for mine in found.values()), default=0))
    if options.plot:
        slo = f"TTFT ≤ {objective.ttft_s} s, TPOT ≤ {objective.tpot_s} s, gaps ≤ {objective.gap_s} s"
        plot.save(options.plot, figures, goodputs, options.attain, f"{options.workload}: {slo}; {cores}")
    told = {
        "model": files.name,
        "codec": options.codec,
        "sequences": options.sequences,
        "preloaded": preloaded(options.rival_python) if options.rival else {},
        "workload": options.workload,
        "seed": options.seed,
        "attain": options.attain,
        "objective_ms": {"ttft": options.slo_ttft_ms, "tpot": options.slo_tpot_ms, "gap": options.slo_gap_ms},
        "arrangements": {
            name: {"devices": devices, "goodput": asdict(goodput), "runs": figures[name]}
            for name, (devices, goodput) in goodputs.items()
        },
    }
    if options.save:
        _save(options.save, told, found, objective)
    checks = bars.checks(figures, goodputs, decides=not options.quick)
    return report.finish("goodput", checks, device=cores, as_json=options.json, **told)


def _save(path: Path, told: dict[str, Any], found: dict[str, _Found], objective: Objective) -> None:
    """What is told, and each request of each run."""
    whole = {
        name: {
            **of,
            "runs": [
                {**figures, "each": runs.details(run, objective)}
                for figures, run in zip(of["runs"], found[name].runs, strict=True)
            ],
        }
        for name, of in told["arrangements"].items()
    }
    everything = {"commit": report.commit(), "versions": report.versions(), **told, "arrangements": whole}
    path.write_text(report.dumps(everything) + "\n")
