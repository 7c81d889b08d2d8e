"""How full a worker is, as gauges that are read when somebody asks for them: nothing keeps them up to date.

Prometheus asks in a thread of its own. What is read here is one number at a time, which is as old as it may be.
"""

from functools import partial

from zipserve.common import __version__
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.kv.prefix_index import PrefixIndex
from zipserve.common.metrics import Metrics


def tell_build(metrics: Metrics, service: str, layout: Layout | None = None, model: str = "") -> None:
    """Says what runs here."""
    codec, model = (layout.codec, layout.model) if layout else ("", model)
    metrics.build_info.labels(service, __version__, model, codec).set(1)


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
