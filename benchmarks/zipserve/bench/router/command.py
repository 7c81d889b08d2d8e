"""`zipserve bench router`: what one router process on one core adds, and how much goes through it."""

import argparse
import asyncio
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer

from zipserve.bench import report
from zipserve.bench.report import Check
from zipserve.bench.router import measure
from zipserve.bench.router.measure import Latency, Memory, Size, Throughput
from zipserve.bench.router.rig import Cores, Rig, on
from zipserve.common import models

PARTS = ("latency", "throughput", "http", "memory")
_TEXT = " The quick brown fox jumps over the lazy dog, and nobody minds: c'est déjà vu — 日本語 too."


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("router", "One router process on a core of its own, before workers that compute nothing.")
    options.add_argument("--model", default=models.DEFAULT_MODEL, help="whose tokenizer is used (default: SmolLM2)")
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help="latency: what it adds to the first token at 50 requests per second, against calls of the workers "
        "themselves; throughput and http: tokens "
        "per second of many streams, over gRPC and as server-sent events; memory: growth over 20,000 requests "
        "(default: all)",
    )  # fmt: skip
    options.add_argument("--profile", type=Path, metavar="FILE", help="leave the router's profile (cProfile) there")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    files = models.resolve(options.model)
    token_ids = Tokenizer.from_file(str(files.folder / "tokenizer.json")).encode(_TEXT).ids
    size, cores = measure.QUICK if options.quick else Size(), Cores.of_this_machine()
    checks: list[Check] = []
    details: dict[str, object] = {"size": asdict(size), "cores": {k: sorted(v) for k, v in vars(cores).items()}}
    with on(cores.others), Rig(files, token_ids, cores, options.profile) as rig:
        for part in options.parts:
            found = asyncio.run(getattr(measure, part)(rig, size))
            report.progress(f"{part}: {found}")
            details[part] = asdict(found)
            checks += _bars(part, found, decides=not options.quick)
    return report.finish("router", checks, device=report.cpu(1), as_json=options.json, **details)


def _bars(part: str, found: Latency | Throughput | Memory, *, decides: bool) -> list[Check]:
    names = {"throughput": "gRPC", "http": "HTTP"}
    match found:
        case Latency():
            added = [found.p50_s - found.direct_p50_s, found.p99_s - found.direct_p99_s]
            return [
                Check("added to the first token, p50 [ms]", added[0] * 1e3, "<=", 3.0, decides),
                Check("added to the first token, p99 [ms]", added[1] * 1e3, "<=", 10.0, decides),
            ]
        case Throughput():
            return [
                Check(f"tokens/s ({names[part]})", found.tokens_per_s, ">=", 5_000, decides),
                Check(f"tokens per second of its CPU ({names[part]})", found.tokens_per_cpu_s, ">=", 5_000, False),
            ]
        case Memory():
            return [Check("growth of memory", found.growth, "<=", 0.1, decides)]
