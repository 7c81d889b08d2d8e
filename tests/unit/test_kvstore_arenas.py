"""The store's memory: what is written to a slab's view is what the transport finds at its address."""

import ctypes
import subprocess
import sys

import pytest

from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.kvstore.arenas import HostArenas


@pytest.mark.parametrize("codec", ["raw", "zip-4/32"])
def test_views_are_at_the_addresses_that_peers_read(codec: str) -> None:
    layout = Layout("m", "0", 2, 1, 16, 16, "float32", codec, 64)
    arenas = HostArenas(layout, blocks=5, sinks=3)
    assert [(a.kind, a.slabs) for a in arenas.arenas] == [
        (kind, {SlabKind.SINKS: 3, SlabKind.BLOCK: 5, SlabKind.TAIL: 1}[kind]) for kind in layout.kinds()
    ]
    for arena in arenas.arenas:
        assert (arena.memory_type, arena.slab_bytes) == ("DRAM", layout.slab_bytes(arena.kind))
        assert arena.base_address % (1 << 21) == 0
        for slab in range(arena.slabs):
            view = arenas.slab_view(arena.kind, slab)
            assert bytes(view) == bytes(arena.slab_bytes)
            view[:] = bytes([slab + 1]) * arena.slab_bytes
        for slab in range(arena.slabs):
            assert ctypes.string_at(arena.address(slab), arena.slab_bytes) == bytes([slab + 1]) * arena.slab_bytes
        for slab in (-1, arena.slabs):
            with pytest.raises(IndexError):
                arenas.slab_view(arena.kind, slab)
    arenas.close()


def test_views_outlive_the_arenas() -> None:
    layout = Layout("m", "0", 2, 1, 16, 16, "float32", "raw", 64)
    arenas = HostArenas(layout, blocks=2, sinks=1)
    view = arenas.slab_view(SlabKind.BLOCK, 1)
    view[0] = 7
    arenas.close()
    assert view[0] == 7


def test_the_store_does_without_torch() -> None:
    code = "import sys, zipserve.kvstore.arenas, zipserve.kvstore.disk; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
