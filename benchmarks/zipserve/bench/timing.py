"""Times things side by side: warm-up, then rounds in which each takes its turn, medians with the middle 80 %."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing."""

    median_s: float
    p10_s: float
    p90_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Of all rounds."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def interleaved(things: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Runs every thing once a round, so that a disturbance meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for number in range(warm_up + rounds):
        for name, thing in things.items():
            started = time.perf_counter()
            thing()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing.of(found) for name, found in seconds.items()}
