"""Host memory for what is read again and again: on huge pages, where the kernel gives them.

A step of decode reads all weights and much of the KV cache once. With pages of 4 KiB the CPU's address translation
bounds that, most of all in virtual machines, where each miss walks two page tables.
"""

import contextlib
import mmap
import threading

import torch

_HUGE_PAGE_BYTES = 1 << 21
_ALIGNMENT_BYTES = mmap.PAGESIZE
_CHUNK_BYTES = 1 << 25
"""Pieces of up to a quarter of this share a mapping: one of its own each would waste half a huge page on average."""


class _Chunk:
    """The mapping from which small pieces are cut. It is given back with the last of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def cut(self, size_bytes: int) -> torch.Tensor:
        whole = -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        with self._lock:
            if self._rest.numel() < whole:
                self._rest = _map(_CHUNK_BYTES)
            piece, self._rest = self._rest[:size_bytes], self._rest[whole:]
        return piece


_chunk = _Chunk()


def allocate(size_bytes: int) -> torch.Tensor:
    """Zeroed memory that begins at a page: uint8 [size_bytes]."""
    return _chunk.cut(size_bytes) if size_bytes <= _CHUNK_BYTES // 4 else _map(size_bytes)


def _map(size_bytes: int) -> torch.Tensor:
    memory = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(mode=False):  # tensors made in that mode cannot be written outside of it
        octets = torch.frombuffer(memory, dtype=torch.uint8)
    start = -octets.data_ptr() % _HUGE_PAGE_BYTES
    return octets[start : start + size_bytes]
