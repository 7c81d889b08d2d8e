"""Host memory for what is read again and again: on huge pages, where the kernel gives them.

A step of decode reads all weights and much of the KV cache once. With pages of 4 KiB the CPU's address translation
bounds that, most of all in virtual machines, where each miss walks two page tables.
"""

import mmap

import torch

_ALIGNMENT_BYTES = 1 << 21


def allocate(size_bytes: int) -> torch.Tensor:
    """Zeroed memory that begins at a huge page: uint8 [size_bytes]. It is given back with its last view."""
    memory = mmap.mmap(-1, size_bytes + _ALIGNMENT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    octets = torch.frombuffer(memory, dtype=torch.uint8)
    start = -octets.data_ptr() % _ALIGNMENT_BYTES
    return octets[start : start + size_bytes]
