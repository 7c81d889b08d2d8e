"""What a service answers under /metrics, read: samples by name and labels, and quantiles of histograms. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)(?: -?\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Buckets = Mapping[float, float]
"""How many were at most so large."""


@dataclass(frozen=True)
class Sample:
    """One line."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Exposition:
    """All samples of a service; of several, if they were added up."""

    samples: Mapping[str, list[Sample]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Sum of all samples of a name that have these labels; 0 if there are none."""
        return sum(s.value for s in self.samples.get(name, ()) if labels.items() <= s.labels.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums of a name by one of its labels."""
        sums: defaultdict[str, float] = defaultdict(float)
        for sample in self.samples.get(name, ()):
            sums[sample.labels.get(label, "")] += sample.value
        return dict(sums)

    def buckets(self, name: str) -> Buckets:
        """Of a histogram, over all its labels."""
        return {float(limit): count for limit, count in self.by(f"{name}_bucket", "le").items()}


def parse(text: str) -> Exposition:
    """Reads the text format. Lines that are none are passed over."""
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    for line in text.split("\n"):  # and at nothing else that Unicode calls a line's end
        match = None if line.startswith("#") else _SAMPLE.fullmatch(line)
        if match is not None:
            labels = {key: _unescaped(value) for key, value in _LABEL.findall(match["labels"] or "")}
            samples[match["name"]].append(Sample(labels, float(match["value"])))
    return Exposition(dict(samples))


def added(expositions: Iterable[Exposition]) -> Exposition:
    """Of several services as if they were one."""
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    for exposition in expositions:
        for name, of_name in exposition.samples.items():
            samples[name] += of_name
    return Exposition(dict(samples))


def since(now: Buckets, before: Buckets) -> Buckets:
    """What a histogram has counted meanwhile; everything, if it has been started anew."""
    counts = {limit: count - before.get(limit, 0.0) for limit, count in now.items()}
    return now if any(count < 0 for count in counts.values()) else counts


def quantile(buckets: Buckets, share: float) -> float | None:
    """Below which value that share lies, as far as the buckets tell; None: there is nothing in them.

    Within a bucket values are taken to lie evenly; beyond the last limit, that limit is told.
    """
    limits = sorted(buckets)
    count = buckets[limits[-1]] if limits else 0.0
    if not count:
        return None
    rank, low, below = share * count, 0.0, 0.0
    for limit in limits:
        if buckets[limit] >= rank:
            inside = buckets[limit] - below
            if limit == float("inf") or not inside:
                return low
            return low + (limit - low) * (rank - below) / inside
        low, below = limit, buckets[limit]
    return low


def _unescaped(text: str) -> str:
    return re.sub(r"\\.", lambda match: _ESCAPED.get(match[0], match[0]), text)
