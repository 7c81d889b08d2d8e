"""The highest rate at which something holds, found by halving. Pure."""

from collections.abc import Callable

_STEPS = 256


def highest_rate(holds: Callable[[float], bool], rate_max: float) -> float:
    """Halves (0, rate_max) down to a 256th of it; the last rate that held, 0 if none did.

    What holds at some rate need not hold at all below it, on a finite trace; this finds what the published rule finds.
    """
    low, high = 0.0, rate_max
    while high - low > rate_max / _STEPS:
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
