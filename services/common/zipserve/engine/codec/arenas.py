"""The byte arenas of a worker, and typed views of their slabs by the layout's fields."""

from dataclasses import dataclass

import torch

from zipserve.common.kv.layout import HEADER_BYTES, SLAB_ALIGNMENT_BYTES, Layout, SlabKind
from zipserve.kernels import memory

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Arenas:
    """All slabs of one worker, uint8 [slabs, layout.slab_bytes(kind)] each. A codec without sinks has none."""

    blocks: torch.Tensor
    tails: torch.Tensor
    sinks: torch.Tensor

    @classmethod
    def allocate(
        cls, layout: Layout, *, blocks: int, tails: int, sinks: int, device: torch.device | str = "cpu"
    ) -> "Arenas":
        """Zeroed memory; every arena starts at a page, because transports register whole pages."""
        return cls(
            _zeros(blocks, layout.slab_bytes(SlabKind.BLOCK), device),
            _zeros(tails, layout.slab_bytes(SlabKind.TAIL), device),
            _zeros(sinks if layout.has_sinks else 0, layout.slab_bytes(SlabKind.SINKS), device),
        )

    def of(self, kind: SlabKind) -> torch.Tensor:
        """The arena of a kind of slab."""
        return {SlabKind.BLOCK: self.blocks, SlabKind.TAIL: self.tails, SlabKind.SINKS: self.sinks}[kind]


def views(layout: Layout, kind: SlabKind, tokens: int, arena: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fields of all slabs of an arena by name: [slabs, layers, *shape].

    Args:
        arena: uint8 [slabs, slab bytes], contiguous.
        tokens: how many tokens a slab holds.
    """
    fields = layout.fields(kind, tokens)
    record_bytes = sum(field.size_bytes for field in fields)
    start, found = HEADER_BYTES, {}
    for field in fields:
        octets = arena.as_strided(
            (arena.shape[0], layout.layers, field.size_bytes),
            (arena.stride(0), record_bytes, 1),
            arena.storage_offset() + start,
        )
        found[field.name] = torch.unflatten(octets.view(TORCH_DTYPES[field.dtype]), 2, field.shape)
        start += field.size_bytes
    return found


def _zeros(slabs: int, slab_bytes: int, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return memory.allocate(slabs * slab_bytes).view(slabs, slab_bytes)
    octets = torch.zeros(slabs * slab_bytes + SLAB_ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
    start = -octets.data_ptr() % SLAB_ALIGNMENT_BYTES
    return octets[start : start + slabs * slab_bytes].view(slabs, slab_bytes)
