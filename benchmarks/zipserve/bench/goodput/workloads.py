"""Loads by name: how long prompts and outputs are, and when they come. Pure.

The same seed gives the same requests at every rate, only closer together, and to every arrangement: what differs
between two runs is not the draw. Prompts are new in every run, so that no cache has seen them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

from zipserve.bench.serve import arrivals as schedule
from zipserve.bench.serve.arrivals import Arrival
from zipserve.common.errors import InvalidRequestError


class Workload(Protocol):
    """Requests at any rate."""

    @property
    def name(self) -> str:
        """For reports."""

    def arrivals(self, count: int, rate: float, seed: str) -> list[Arrival]:
        """The first `count` requests at `rate` per second."""


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of which only what lies within two bounds is drawn."""

    mean: float
    """Of what is drawn, in tokens; not so close to a bound that no such distribution has it."""
    sigma: float
    """Of the logarithm, before the bounds."""
    low: int
    high: int

    def draw(self, count: int, randomness: random.Random) -> list[int]:
        """Lengths in tokens: one from each of `count` equally likely ranges, in any order, so that few of them already
        have the distribution's mean and spread."""
        log = self._logs
        low, high = log.cdf(math.log(self.low)), log.cdf(math.log(self.high))
        shares = [low + (high - low) * (index + randomness.random()) / count for index in range(count)]
        randomness.shuffle(shares)
        lengths = (math.exp(log.inv_cdf(min(max(share, 1e-12), 1 - 1e-12))) for share in shares)
        return [min(max(round(length), self.low), self.high) for length in lengths]

    @cached_property
    def _logs(self) -> NormalDist:
        """Of the logarithms: the centre that gives the mean, by halving, since one grows with the other."""
        low, high = math.log(self.low) - 4 * self.sigma, math.log(self.high) + 4 * self.sigma
        for _ in range(60):
            centre = (low + high) / 2
            low, high = (centre, high) if self._mean_at(centre) < self.mean else (low, centre)
        return NormalDist(low, self.sigma)

    def _mean_at(self, centre: float) -> float:
        low, high = ((math.log(bound) - centre) / self.sigma for bound in (self.low, self.high))
        unit = NormalDist()
        within = unit.cdf(high) - unit.cdf(low)
        weighted = unit.cdf(high - self.sigma) - unit.cdf(low - self.sigma)
        return math.exp(centre + self.sigma**2 / 2) * weighted / within


@dataclass(frozen=True)
class Mix:
    """Lengths drawn apart from each other; arrivals of a Poisson process, given how many there are in their time, which
    makes the rate the one that is told."""

    name: str
    prompt: Lengths
    output: Lengths

    def arrivals(self, count: int, rate: float, seed: str) -> list[Arrival]:
        """See Workload."""
        randomness = random.Random(seed)  # noqa: S311  the same in every run
        at = sorted(randomness.uniform(0, count) for _ in range(count))
        prompts, outputs = self.prompt.draw(count, randomness), self.output.draw(count, randomness)
        return [Arrival(at_s / rate, *sizes) for at_s, *sizes in zip(at, prompts, outputs, strict=True)]


@dataclass(frozen=True)
class Trace:
    """Arrivals of a file, played so fast that those that are sent come at the wanted rate. The seed changes nothing."""

    name: str
    recorded: Sequence[Arrival]
    """In order; at least two, not all at once."""

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """
        Raises:
            InvalidRequestError: it is no trace, or one without a rate.
            OSError: the file cannot be read.
        """
        recorded = schedule.read_trace(path)
        if math.isnan(mean_rate([due.at_s for due in recorded])):
            raise InvalidRequestError(f"{path}: {len(recorded)} requests at one time have no rate", field="workload")
        return cls(path.name, recorded)

    def arrivals(self, count: int, rate: float, seed: str) -> list[Arrival]:
        """See Workload.

        Raises:
            InvalidRequestError: there are fewer, or these have no rate.
        """
        if count > len(self.recorded):
            raise InvalidRequestError(f"{self.name} has {len(self.recorded)} requests, not {count}", field="requests")
        sent = self.recorded[:count]
        recorded_rate = mean_rate([due.at_s for due in sent])
        if math.isnan(recorded_rate):
            raise InvalidRequestError(f"{self.name}: its first {count} requests have no rate", field="requests")
        first_s, speed = sent[0].at_s, rate / recorded_rate
        return [Arrival((due.at_s - first_s) / speed, due.prompt_tokens, due.output_tokens) for due in sent]


def mean_rate(times_s: Sequence[float]) -> float:
    """Per second, of times in order: one over the mean gap; NaN of fewer than two, or of those all at one time."""
    seconds = times_s[-1] - times_s[0] if times_s else 0.0
    return (len(times_s) - 1) / seconds if seconds > 0 else math.nan


# All fit into a context of 1,024 tokens. `rival` is the one on which rivals' settings were tuned. The others have mean
# lengths of DistServe's (Figure 7): HumanEval's as they are; ShareGPT's and LongBench's a little more than a third.
MIXES = {
    mix.name: mix
    for mix in (
        Mix("rival", Lengths(262, 0.6, 64, 768), Lengths(42, 0.5, 16, 64)),
        Mix("chat", Lengths(280, 1.0, 16, 768), Lengths(74, 0.8, 8, 255)),
        Mix("code", Lengths(171, 0.5, 48, 512), Lengths(98, 0.7, 16, 255)),
        Mix("summary", Lengths(640, 0.3, 256, 896), Lengths(34, 0.5, 8, 127)),
    )
}


def named(name: str) -> Workload:
    """One of MIXES, or the trace of a file.

    Raises:
        InvalidRequestError: it is neither.
        OSError: the file cannot be read.
    """
    if name in MIXES:
        return MIXES[name]
    if not Path(name).is_file():
        raise InvalidRequestError(f"{name!r} is no file and none of {', '.join(MIXES)}", field="workload")
    return Trace.read(Path(name))
