"""What a client saw of each request, and what that comes to. Pure. All times in seconds of one clock."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Record:
    """One request."""

    due_s: float
    """When it was to be sent; what it waited for is counted from here."""
    prompt_tokens: int
    sent_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When tokens came, and how many."""
    ended_s: float = 0.0
    error: str = ""
    """Reason; empty: none."""
    server: dict[str, float] = field(default_factory=dict)
    """Seconds that the server told of itself, if it does."""

    @property
    def tokens(self) -> int:
        """That came."""
        return sum(count for _, count in self.arrivals)

    @property
    def lag_s(self) -> float:
        """How much too late it was sent: a fault of this client."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token; NaN without one."""
        return self.arrivals[0][0] - self.due_s if self.arrivals else math.nan

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after those that came first; NaN without any."""
        later = self.tokens - self.arrivals[0][1] if self.arrivals else 0
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later > 0 else math.nan

    @property
    def e2e_s(self) -> float:
        """From when it was due to its end."""
        return self.ended_s - self.due_s

    def gaps_s(self) -> list[float]:
        """Between arrivals of tokens."""
        return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(self.arrivals)]

    @property
    def largest_gap_s(self) -> float:
        """NaN without any."""
        return max(self.gaps_s(), default=math.nan)


@dataclass(frozen=True)
class Objective:
    """What a request has to keep to count. None: anything."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    gap_s: float | None = None
    """Of every gap between tokens."""

    def kept(self, record: Record) -> bool:
        """By a request that succeeded; one of a single token has no time per token and no gap, which keeps any."""
        if record.error or not record.arrivals:
            return False
        late = self.ttft_s is not None and record.ttft_s > self.ttft_s
        slow = self.tpot_s is not None and record.tpot_s > self.tpot_s
        stalled = self.gap_s is not None and record.largest_gap_s > self.gap_s
        return not (late or slow or stalled)


def quantile(values: Iterable[float], q: float) -> float:
    """Interpolated between the nearest ranks; NaN of nothing. NaNs are left out."""
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return math.nan
    rank = q * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summary(records: Sequence[Record], objective: Objective) -> dict[str, Any]:
    """Rates, quantiles, goodput and errors of a run."""
    done = [record for record in records if not record.error]
    seconds = max((r.ended_s for r in records), default=0.0) - min((r.due_s for r in records), default=0.0)
    kept = sum(objective.kept(record) for record in records)
    per_s = 1 / seconds if seconds > 0 else math.nan
    return {
        "requests": len(records),
        "seconds": seconds,
        "requests_per_s": len(done) * per_s,
        "prompt_tokens_per_s": sum(r.prompt_tokens for r in done) * per_s,
        "output_tokens_per_s": sum(r.tokens for r in done) * per_s,
        "errors": dict(Counter(r.error for r in records if r.error)),
        "ttft_s": _quantiles(r.ttft_s for r in done),
        "tpot_s": _quantiles(r.tpot_s for r in done),
        "itl_s": _quantiles(gap for r in done for gap in r.gaps_s()),
        "e2e_s": _quantiles(r.e2e_s for r in done),
        "lag_s": _quantiles(r.lag_s for r in records),
        "goodput": {
            "ttft_s": objective.ttft_s,
            "tpot_s": objective.tpot_s,
            "gap_s": objective.gap_s,
            "share": kept / len(records) if records else math.nan,
            "requests_per_s": kept * per_s,
        },
    }


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {f"p{q * 100:g}": quantile(found, q) for q in QUANTILES}
