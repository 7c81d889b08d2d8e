"""A histogram for what happens at every token: prometheus_client's own takes locks, and five times as long."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class QuickHistogram(Collector):
    """Without labels. One thread observes, any may read; what is read may lack the newest value in one of its numbers.

    Args:
        buckets: upper limits, rising.
    """

    def __init__(
        self, name: str, meaning: str, buckets: Sequence[float], registry: CollectorRegistry | None = None
    ) -> None:
        self._name = name
        self._meaning = meaning
        self._limits = tuple(buckets)
        self._counts = [0] * (len(self._limits) + 1)
        self._sum = 0.0
        if registry is not None:
            registry.register(self)

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._limits, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        """As Prometheus reads it."""
        names = [*map(str, self._limits), "+Inf"]
        yield HistogramMetricFamily(
            self._name,
            self._meaning,
            buckets=list(zip(names, accumulate(self._counts), strict=True)),
            sum_value=self._sum,
        )

    def describe(self) -> Iterable[Metric]:
        """Its name and type, without values."""
        yield HistogramMetricFamily(self._name, self._meaning)
