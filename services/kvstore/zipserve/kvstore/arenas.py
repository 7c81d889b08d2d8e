"""The store's memory: for each kind of slab one region, which the transport registers and peers read.

On huge pages, where the kernel gives them. Plain mappings, because the store does without torch.
"""

import mmap
from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.transport import ArenaInfo

_HUGE_PAGE_BYTES = 1 << 21


class HostArenas:
    """Zeroed slabs of every kind of a layout.

    Of tails there is one, which nobody uses: workers read only from peers with an arena for every kind of their own.

    Args:
        blocks: slabs for blocks, and as many for sinks as `sinks` says, if the codec has any; at least 1 of each.
    """

    def __init__(self, layout: Layout, *, blocks: int, sinks: int) -> None:
        slabs = {SlabKind.SINKS: sinks, SlabKind.BLOCK: blocks, SlabKind.TAIL: 1}
        self._regions = {kind: _Region(layout.slab_bytes(kind) * slabs[kind]) for kind in layout.kinds()}
        self._arenas: Mapping[SlabKind, ArenaInfo] = {
            kind: ArenaInfo(kind, region.address, layout.slab_bytes(kind), slabs[kind], "DRAM")
            for kind, region in self._regions.items()
        }
        self.arenas = list(self._arenas.values())

    def slab_view(self, kind: SlabKind, slab: int) -> memoryview:
        """The writable bytes of a slab.

        Raises:
            IndexError: there is no such slab.
            KeyError: the codec has no such kind.
        """
        arena = self._arenas[kind]
        start = arena.address(slab) - arena.base_address
        return self._regions[kind].view[start : start + arena.slab_bytes]

    def close(self) -> None:
        """Gives the memory back, that of a region at once unless somebody still has a view of it, then with the last
        one. Nobody may read it through the transport any more.
        """
        for region in self._regions.values():
            region.close()


class _Region:
    def __init__(self, size_bytes: int) -> None:
        self._memory = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # of a kernel that was built without them
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        begin: int = np.frombuffer(self._memory, np.uint8).ctypes.data
        start = -begin % _HUGE_PAGE_BYTES
        self.address = begin + start
        self.view = memoryview(self._memory)[start : start + size_bytes]

    def close(self) -> None:
        self.view.release()
        with suppress(BufferError):
            self._memory.close()
