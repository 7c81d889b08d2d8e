"""The highest rate at which enough requests keep their objectives, from runs that scatter. Pure.

Rates lie on a grid whose neighbours differ by a fixed factor, so that all arrangements are measured at the same rates.
What is told never rises with the rate: shares that do are averaged (the isotonic fit), as only chance makes them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_FACTOR = 1.1
"""Between neighbours of the grid."""
_HALVINGS_MAX = 2
"""Below the first rate; runs of low rates are long."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Point:
    """Requests at one rate."""

    rate: float
    kept: float
    """That kept all objectives."""
    requests: int

    @property
    def share(self) -> float:
        """Of them."""
        return self.kept / self.requests


@dataclass(frozen=True)
class Goodput:
    """What a set of runs says."""

    rate: float
    """The highest measured one that enough requests bear; 0: none."""
    below: float
    """The lowest measured one at which they do not; infinite: there is none, and the goodput is at least `rate`."""

    @property
    def most(self) -> float:
        """What it is at most: `rate`, where `below` is its neighbour on the grid, else `below`."""
        return self.rate if self.below <= self.rate * _FACTOR * (1 + _ROUNDING) else self.below


def fitted(points: Iterable[Point]) -> list[Point]:
    """One point for each rate, in order of rates: runs of a rate together, and neighbours that rise averaged."""
    of_rate: dict[float, Point] = {}
    for point in points:
        before = of_rate.get(point.rate, Point(point.rate, 0, 0))
        of_rate[point.rate] = Point(point.rate, before.kept + point.kept, before.requests + point.requests)
    levels: list[list[Point]] = []
    for rate in sorted(of_rate):
        levels.append([of_rate[rate]])
        while len(levels) > 1 and _share(levels[-2]) < _share(levels[-1]):
            last = levels.pop()
            levels[-1] += last
    return [Point(point.rate, _share(level) * point.requests, point.requests) for level in levels for point in level]


def goodput(points: Iterable[Point], attain: float) -> Goodput:
    """The rate at which the share of requests that keep their objectives falls below `attain`."""
    shares = fitted(points)
    enough = [point.rate for point in shares if point.share >= attain]
    short = [point.rate for point in shares if point.share < attain]
    return Goodput(max(enough, default=0.0), min(short, default=math.inf))


def repeats(rates: Sequence[float]) -> list[tuple[float, int]]:
    """Each of the rates, and how many runs it has had before, as `Search.next` tells them."""
    return [(rate, rates[:index].count(rate)) for index, rate in enumerate(rates)]


class Search:
    """Says at which rate to measure next: doubles or halves until the goodput lies between two rates, then halves what
    is between them. A rate next to the goodput whose share could be chance is measured once more."""

    def __init__(self, attain: float, start: float, *, factor: float = _FACTOR, runs_max: int = 10) -> None:
        """
        Args:
            attain: share of requests that must keep their objectives.
            start: first rate; above 0.
            factor: between neighbours of the grid; above 1.
            runs_max: most runs, however close to the goodput they have come.
        """
        self._attain = attain
        self._start = start
        self._factor = factor
        self._runs_max = runs_max
        self._double = max(1, round(math.log(2) / math.log(factor)))
        self._points: list[tuple[int, Point]] = []

    def next(self) -> tuple[float, int] | None:
        """The next rate, and how many runs it has had; None: nothing more is to be learned."""
        step = self._next_step()
        if step is None or len(self._points) >= self._runs_max:
            return None
        return self._rate(step), self._runs(step)

    def add(self, kept: float, requests: int) -> None:
        """Takes the outcome at the rate that `next` has told."""
        step = self._next_step()
        assert step is not None
        self._points.append((step, Point(self._rate(step), kept, requests)))

    @property
    def points(self) -> Sequence[Point]:
        """All outcomes."""
        return [point for _, point in self._points]

    def _next_step(self) -> int | None:
        """Rates are counted in steps of the grid from the first one."""
        if not self._points:
            return 0
        steps = sorted({step for step, _ in self._points})
        shares = dict(zip(steps, fitted(self.points), strict=True))
        enough = max((step for step in steps if shares[step].share >= self._attain), default=None)
        short = min((step for step in steps if shares[step].share < self._attain), default=None)
        if short is None:
            return steps[-1] + self._double
        if enough is None:
            lower = steps[0] - self._double
            return lower if lower >= -_HALVINGS_MAX * self._double else None
        if short - enough > 1:
            return (enough + short) // 2
        doubtful = [step for step in (enough, short) if self._runs(step) == 1 and self._by_chance(shares[step])]
        return min(doubtful, key=lambda step: abs(shares[step].share - self._attain), default=None)

    def _by_chance(self, point: Point) -> bool:
        """Whether a share lies within a standard error of what decides."""
        return abs(point.share - self._attain) < math.sqrt(self._attain * (1 - self._attain) / point.requests)

    def _runs(self, step: int) -> int:
        return sum(of == step for of, _ in self._points)

    def _rate(self, step: int) -> float:
        return self._start * self._factor**step


def _share(level: Sequence[Point]) -> float:
    return sum(point.kept for point in level) / sum(point.requests for point in level)
