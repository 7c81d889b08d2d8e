"""What was timed, for a person to read."""

from collections.abc import Sequence

from zipserve.bench import report
from zipserve.bench.engine.bars import Found
from zipserve.bench.engine.contestants import PATHS
from zipserve.bench.engine.measure import Cell


def timings(found: Found) -> str:
    """All timings, with rates, and how they stand to the first contestant and to the limits."""
    lines = []
    for cell, timings in found.results.items():
        first = next(iter(timings.values()))
        for name, timing in timings.items():
            times = (f"{seconds * 1e3:.1f}" for seconds in (timing.median_s, timing.p10_s, timing.p90_s))
            rate, ratio = f"{cell.tokens_s(timing):.1f}", f"{first.median_s / timing.median_s:.2f}"
            lines.append((cell.name, name, *times, rate, ratio, _share(found, cell, name)))
    head = ("cell", "who", "median ms", "p10", "p90", "tokens/s", "speed", "of limit")
    return report.table(head, _aligned(lines))


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """With the second column to the left too, as names are read."""
    width = max((len(line[1]) for line in lines), default=0)
    return [(line[0], line[1].ljust(width), *line[2:]) for line in lines]


def _share(found: Found, cell: Cell, name: str) -> str:
    """Of the read bandwidth in decode steps, of the multiply-add limit in prefill; rivals read float32 weights too."""
    median_s = found.results[cell][name].median_s
    if cell.kind == "prefill":
        return f"{found.work.prefill_flops(cell.tokens) / median_s / found.limits.flops_s:.0%}"
    words = name.split()
    storage = words[1] if words[0] in PATHS else "float32"
    layout = found.layouts.get(words[-1], found.layouts[next(iter(found.layouts))])
    size = found.work.decode_bytes(storage, layout, cell.rows, cell.tokens)
    return f"{size / median_s / found.limits.read_bytes_s:.0%}"
