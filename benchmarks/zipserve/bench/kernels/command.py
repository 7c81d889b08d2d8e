"""`zipserve bench kernels`: its options, and the run from data to bars."""

import argparse
from dataclasses import asdict

import torch

from zipserve.bench import report
from zipserve.bench.kernels.cases import Case, all_cases
from zipserve.bench.kernels.data import Heads
from zipserve.bench.report import Check
from zipserve.bench.timing import Timing, interleaved
from zipserve.common.kv.layout import DEFAULT_CODEC
from zipserve.kernels.zipformat import PROFILES

SHAPES = {"smollm2": Heads(9, 3, 64), "llama3-8b": Heads(32, 8, 128)}
BANDWIDTH_BYTES = 256 << 20


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("kernels", "Operations on KV blocks beside references, SDPA and the memory's bandwidth.")
    options.add_argument(
        "--profile", choices=PROFILES, default=DEFAULT_CODEC.removeprefix("zip-"), help="of the zip format"
    )
    options.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="attention of which models")
    options.add_argument("--rounds", type=report.whole(1), default=15, metavar="N", help="of timing (default: 15)")
    options.add_argument("--threads", type=report.whole(1), metavar="T", help="CPU threads (default: all cores)")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status.

    Raises:
        InternalError: a kernel and its reference disagree, so that its speed means nothing.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, context, rounds = (8, 4096, options.rounds) if not options.quick else (2, 512, 3)
    bandwidth = _read_bandwidth(rounds)
    lines, checks, results = [], [], {}
    for shape in options.shapes:
        for case in all_cases(SHAPES[shape], options.profile, rows=rows, context=context):
            case.require_equal()
            timings = interleaved(case.ways, rounds)
            slow = {name: _scaled(timing, case) for name, timing in interleaved(case.slow_ways, 1, 1).items()}
            lines += [_line(case, way, timing, bandwidth) for way, timing in {**timings, **slow}.items()]
            checks += _checks(case, timings, bandwidth, decides=not options.quick)
            results[case.name] = {way: asdict(timing) for way, timing in {**timings, **slow}.items()}
            report.progress(case.name)
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print(report.table(("operation", "way", "median", "p10", "p90", "GB/s", "of bandwidth"), lines), end="\n\n")
    device = report.cpu(torch.get_num_threads())
    return report.finish(
        "kernels", checks, device=device, as_json=options.json, bandwidth_bytes_s=bandwidth, results=results
    )


def _read_bandwidth(rounds: int) -> float:
    """Bytes per second of a sum over memory that no cache holds: the best that was seen, to be fair to nobody."""
    memory = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
    timing = interleaved({"read": memory.sum}, max(5, rounds))["read"]
    return BANDWIDTH_BYTES / timing.p10_s


def _scaled(timing: Timing, case: Case) -> Timing:
    """Of all data, from that of a part."""
    return Timing(*(seconds / case.slow_share for seconds in asdict(timing).values()))


def _line(case: Case, way: str, timing: Timing, bandwidth: float) -> tuple[str, ...]:
    rate = case.size_bytes / timing.median_s
    times = (f"{seconds * 1e3:.3f} ms" for seconds in (timing.median_s, timing.p10_s, timing.p90_s))
    return case.name, way, *times, f"{rate / 1e9:.2f}", f"{rate / bandwidth:.0%}"


def _checks(case: Case, timings: dict[str, Timing], bandwidth: float, *, decides: bool) -> list[Check]:
    kernel = timings["kernel"].median_s
    if case.name.startswith("quantize"):
        share = case.size_bytes / kernel / bandwidth
        return [Check(f"{case.name}: share of the read bandwidth", share, ">=", 0.5, decides)]
    if case.name.startswith("attention"):
        return [
            Check(f"{case.name}: times as fast as SDPA", timings["SDPA"].median_s / kernel, ">=", 2.5, decides),
            Check(
                f"{case.name}: times as fast as raw pages", timings["raw pages"].median_s / kernel, ">=", 1.0, decides
            ),
        ]
    if case.name.startswith("prefill"):
        return [Check(f"{case.name}: times as fast as SDPA", timings["SDPA"].median_s / kernel, ">=", 1.4, decides)]
    return []
