"""How full a worker is, as gauges that are read when somebody asks for them: nothing keeps them up to date.

Prometheus asks in a thread of its own. What is read here is one number at a time, which is as old as it may be.
"""

from functools import partial
from typing import Protocol

from zipserve.common import __version__
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.metrics import Metrics


def tell_build(metrics: Metrics, service: str, layout: Layout | None = None, model: str = "") -> None:
    """Says what runs here."""
    codec, model = (layout.codec, layout.model) if layout else ("", model)
    metrics.build_info.labels(service, __version__, model, codec).set(1)


class Queue(Protocol):
    """What a scheduler says of its work."""

    @property
    def queued_requests(self) -> int:
        """Requests that wait."""

    @property
    def queued_tokens(self) -> int:
        """Tokens of theirs."""

    @property
    def running_requests(self) -> int:
        """Requests that are being computed."""


def watch_queue(metrics: Metrics, queue: Queue) -> None:
    """Tells how long it is from now on."""
    metrics.queued_requests.set_function(lambda: queue.queued_requests)
    metrics.queued_tokens.set_function(lambda: queue.queued_tokens)
    metrics.running_requests.set_function(lambda: queue.running_requests)


def watch_pools(metrics: Metrics, layout: Layout, index: PrefixIndex) -> None:
    """Tells the levels of all arenas from now on."""
    pools = index.pools
    for kind in layout.kinds():
        pool = (kind.name.lower(), layout.codec, layout.precision_of(kind))
        slabs = pools.of(kind)
        metrics.arena_bytes.labels(*pool).set(slabs.count * layout.slab_bytes(kind))
        for state in ("free", "idle", "used"):
            metrics.slabs.labels(*pool, state).set_function(partial(getattr, slabs, state))
    metrics.bits_per_value.labels(layout.codec, layout.precision).set(layout.bits_per_value())
    metrics.free_blocks.set_function(lambda: pools.available(SlabKind.BLOCK))
    metrics.cached_blocks.set_function(lambda: len(index))
