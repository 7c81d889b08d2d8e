"""What `zipserve top` shows: two looks at all processes of a cluster, put together. Pure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from zipserve.cli.exposition import Exposition, added, quantile, since

QUANTILES = (0.5, 0.9, 0.99)
_LATENCIES = {"ttft": "zipserve_first_token_seconds", "itl": "zipserve_inter_token_seconds",
              "request": "zipserve_request_seconds"}  # fmt: skip
_REASONS = {
    "rejected": "zipserve_requests_rejected_total",
    "replayed": "zipserve_replays_total",
    "refused_kv": "zipserve_kv_handoff_failures_total",
    "deadline": "zipserve_deadline_misses_total",
}
_LABELS = {"deadline": "stage"}


@dataclass(frozen=True)
class Process:
    """One process, as far as it could be asked."""

    name: str
    role: str
    address: str
    """Of its metrics; empty: it has none."""
    state: str
    """ready, draining, or why it could not be asked."""
    exposition: Exposition | None = None


@dataclass(frozen=True)
class Look:
    """All processes at one time, in seconds."""

    at_s: float
    processes: Sequence[Process]


@dataclass(frozen=True)
class Row:
    """One process."""

    name: str
    role: str
    state: str
    running: int
    queued: int
    parked: int
    tokens_per_s: float
    """Of prompts where it computes prompts only, else generated ones."""
    blocks_used: int
    blocks_idle: int
    """Found by prompts with the same prefix, until somebody needs room."""
    blocks_free: int
    leases: int


@dataclass(frozen=True)
class Board:
    """Everything that is shown. Rates are those since the look before."""

    rows: list[Row]
    latency_s: Mapping[str, Mapping[str, float | None]]
    """Of ttft, itl and request: p50, p90 and p99; of what came since the look before, or of all if nothing did."""
    requests_per_s: float
    flow_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """KV by `source>reader`."""
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of what went wrong since the processes began."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def board(before: Look, now: Look) -> Board:
    """Puts two looks together."""
    seconds = max(now.at_s - before.at_s, 1e-9)
    earlier = {process.name: process.exposition or Exposition() for process in before.processes}
    flow: defaultdict[str, float] = defaultdict(float)
    for process in now.processes:
        for source in (process.exposition or Exposition()).by("zipserve_kv_transfer_bytes_total", "source"):
            moved = _rate(process, earlier, seconds, "zipserve_kv_transfer_bytes_total", source=source)
            flow[f"{source}>{process.role}"] += moved
    all_now = added(p.exposition for p in now.processes if p.exposition)
    all_before = added(earlier.values())
    return Board(
        rows=[_row(process, earlier, seconds) for process in now.processes],
        latency_s={name: _latency(all_now, all_before, metric) for name, metric in _LATENCIES.items()},
        requests_per_s=sum(_rate(p, earlier, seconds, "zipserve_requests_total") for p in now.processes),
        flow_bytes_per_s=dict(flow),
        reasons={name: _counts(all_now, metric, _LABELS.get(name, "reason")) for name, metric in _REASONS.items()},
    )


def _row(process: Process, earlier: Mapping[str, Exposition], seconds: float) -> Row:
    found = process.exposition or Exposition()
    tokens = "zipserve_prompt_tokens_total" if process.role == "prefill" else "zipserve_generated_tokens_total"

    def blocks(state: str) -> int:
        return round(found.total("zipserve_kv_slabs", arena="block", state=state))

    return Row(
        name=process.name,
        role=process.role,
        state=process.state,
        running=round(found.total("zipserve_running_requests")),
        queued=round(found.total("zipserve_queued_requests")),
        parked=round(found.total("zipserve_parked_requests")),
        tokens_per_s=_rate(process, earlier, seconds, tokens),
        blocks_used=blocks("used"),
        blocks_idle=blocks("idle"),
        blocks_free=blocks("free"),
        leases=round(found.total("zipserve_kv_leases")),
    )


def _rate(process: Process, earlier: Mapping[str, Exposition], seconds: float, name: str, **labels: str) -> float:
    """Per second; of a process that was not asked before, or has been started anew, 0."""
    if process.exposition is None or process.name not in earlier:
        return 0.0
    return max(0.0, process.exposition.total(name, **labels) - earlier[process.name].total(name, **labels)) / seconds


def _latency(now: Exposition, before: Exposition, name: str) -> dict[str, float | None]:
    fresh = since(now.buckets(name), before.buckets(name))
    chosen = fresh if any(fresh.values()) else now.buckets(name)
    return {f"p{share * 100:g}": quantile(chosen, share) for share in QUANTILES}


def _counts(now: Exposition, name: str, label: str) -> dict[str, int]:
    return {reason: round(count) for reason, count in sorted(now.by(name, label).items()) if count}


def lines(board: Board) -> list[str]:
    """For people."""
    latency = [
        f"{name:<8}" + "".join(f"  {key} {_seconds(value):>9}" for key, value in quantiles.items())
        for name, quantiles in board.latency_s.items()
    ]
    edges = sorted(board.flow_bytes_per_s.items())
    flow = [f"{edge.replace('>', ' → '):<20} {rate / 1e6:9.2f} MB/s" for edge, rate in edges]
    reasons = [
        f"{what.replace('_', ' '):<11} " + ", ".join(f"{reason} {count}" for reason, count in counts.items())
        for what, counts in board.reasons.items()
        if counts
    ]
    parts = [_table(board.rows), [f"{board.requests_per_s:.1f} requests/s", *latency], flow, reasons]
    return [line for part in parts if part for line in ("", *part)][1:]


def _table(rows: Sequence[Row]) -> list[str]:
    head = ("process", "role", "state", "run", "queue", "park", "tok/s", "used", "idle", "free", "leases")
    cells = [head, *(tuple(f"{v:.0f}" if isinstance(v, float) else str(v) for v in astuple(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = ("process", "role", "state")
    return [
        "  ".join(
            cell.ljust(width) if name in words else cell.rjust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        )
        for row in cells
    ]


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
