"""What a plan has to reach: limits on first tokens and on tokens, and for how many requests. Pure."""

import math
from dataclasses import dataclass

import numpy as np

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.chain import Floats, Goal

_NO_LIMIT = 2**62


@dataclass(frozen=True)
class Slo:
    """Service level objectives. Infinite limits are none."""

    ttft_ms: float
    """From arrival to first token."""
    tpot_ms: float
    """Mean time per token after the first."""
    attainment: float = 0.9
    """Share of the requests."""
    joint: bool = True
    """Whether that share has to keep both limits, each inclusive; if not, the percentile of each time by itself has to
    be below its limit, as in the published simulator."""

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft_ms), ("tpot", self.tpot_ms)):
            if not value > 0:
                raise InvalidRequestError(
                    f"the limit on {name.upper()} is {value:g} ms, not above 0", field=f"slo_{name}"
                )
        if not 0 < self.attainment <= 1:
            raise InvalidRequestError(f"an attainment of {self.attainment:g} is not in (0, 1]", field="attainment")

    def misses_max(self, requests: int) -> int:
        """With more late ones a run has failed for certain."""
        if self.joint:
            met = math.ceil(self.attainment * requests)
            while met and (met - 1) / requests >= self.attainment:
                met -= 1
            return requests - met
        return requests - 1 - math.floor(self.attainment * (requests - 1))

    def goal(self, requests: int) -> Goal:
        """When a simulation may give up."""
        misses = self.misses_max(requests)
        if self.joint:
            # late: at the bound or above, and here the limit itself is in time
            bounds = math.nextafter(self.ttft_ms, math.inf), math.nextafter(self.tpot_ms, math.inf)
            return Goal(*bounds, _NO_LIMIT, _NO_LIMIT, misses)
        return Goal(self.ttft_ms, self.tpot_ms, misses, misses, _NO_LIMIT)

    def attained(self, ttft_ms: Floats, tpot_ms: Floats) -> float:
        """Share of the requests that kept both limits."""
        return float(np.mean((ttft_ms <= self.ttft_ms) & (tpot_ms <= self.tpot_ms)))

    def kept(self, ttft_ms: Floats, tpot_ms: Floats) -> bool:
        """Whether a complete run reached the objectives."""
        if self.joint:
            return self.attained(ttft_ms, tpot_ms) >= self.attainment
        percentile = self.attainment * 100
        return bool(
            np.percentile(ttft_ms, percentile) < self.ttft_ms and np.percentile(tpot_ms, percentile) < self.tpot_ms
        )


def unlimited(requests: int) -> Goal:
    """A run with this goal always goes on to its end."""
    return Goal(math.inf, math.inf, requests, requests, requests)
