"""Blocks to work on: more of them than the caches of a CPU hold, so that memory is what is read."""

from dataclasses import dataclass

import torch

from zipserve.kernels.attention import OpenBlocks, RawFormat, SealedBlocks
from zipserve.kernels.quantize import quantize
from zipserve.kernels.zipformat import ZipFormat


@dataclass(frozen=True)
class Heads:
    """Shape of one layer's attention."""

    query: int
    kv: int
    dim: int

    @property
    def name(self) -> str:
        """Such as 9/3x64."""
        return f"{self.query}/{self.kv}x{self.dim}"


def blocks(heads: Heads, count: int, block_tokens: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of random blocks, float32 [count, kv heads, block_tokens, dim] each."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, heads.kv, block_tokens, heads.dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def zipped(heads: Heads, profile: str, keys: torch.Tensor, values: torch.Tensor) -> tuple[ZipFormat, torch.Tensor]:
    """The format, and the blocks in it: uint8 [count, layer_bytes]."""
    form = ZipFormat(heads.kv, heads.dim, heads.dim, keys.shape[2], profile)
    data = torch.empty(len(keys), form.layer_bytes, dtype=torch.uint8)
    hi = torch.rand(len(keys), form.block_tokens, generator=torch.Generator().manual_seed(1)).argsort(1)
    slabs = torch.arange(len(keys))
    none = torch.full_like(slabs, -1)
    quantize(keys, values, hi < form.hi_tokens, form, data, slabs, no_sinks(form), none)
    return form, data


def no_sinks(form: ZipFormat) -> torch.Tensor:
    """For blocks none of which is the first of its sequence."""
    return torch.empty(0, form.sinks_layer_bytes, dtype=torch.uint8)


def raw(heads: Heads, keys: torch.Tensor, values: torch.Tensor) -> tuple[RawFormat, torch.Tensor]:
    """The same for blocks as they are."""
    form = RawFormat(heads.kv, heads.dim, heads.dim, keys.shape[2], torch.float32)
    return form, torch.cat((keys.flatten(2), values.flatten(2)), 2).flatten(1).view(torch.uint8)


@dataclass(frozen=True)
class DecodeBatch:
    """A decode step: rows of equal context, each with blocks of its own."""

    query: torch.Tensor
    open_blocks: OpenBlocks
    table: torch.Tensor
    first: torch.Tensor

    @classmethod
    def of(cls, heads: Heads, rows: int, blocks_each: int, block_tokens: int = 128) -> "DecodeBatch":
        """Row r reads blocks r * blocks_each and following, behind the sinks of nobody, and one open token."""
        generator = torch.Generator().manual_seed(2)
        shape = (rows, heads.kv, block_tokens, heads.dim)
        opened = OpenBlocks(
            torch.randn(shape, generator=generator),
            torch.randn(shape, generator=generator),
            torch.arange(rows, dtype=torch.int32),
            torch.ones(rows, dtype=torch.int32),
        )
        table = torch.arange(rows * blocks_each, dtype=torch.int32).view(rows, blocks_each)
        query = torch.randn(rows, heads.query, heads.dim, generator=generator)
        return cls(query, opened, table, torch.full((rows,), block_tokens, dtype=torch.int32))

    def sealed(self, form: ZipFormat | RawFormat, data: torch.Tensor) -> SealedBlocks:
        """Its sealed blocks; they start at the second block of the sequence, so that there are no sinks."""
        rows, columns = self.table.shape
        counts = torch.full((rows,), columns, dtype=torch.int32)
        none = torch.full((rows,), -1, dtype=torch.int32)
        sinks = no_sinks(form) if isinstance(form, ZipFormat) else data
        return SealedBlocks(form, data, self.table, counts, self.first, sinks, none)
