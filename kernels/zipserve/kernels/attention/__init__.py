"""Decode attention: one query a row over its sealed blocks, as they are, and the open block that it grows in.

Nothing is dequantized: the key channels' widths are folded into the query once per block, the values' scales into the
softmax weights, and codes are multiplied as they are. Grouped-query, windows, softcap and sink logits included.
"""

from dataclasses import dataclass, replace

import torch

from zipserve.kernels.attention.cpu import Call, decode_attention_cpu, runs_on_cpu
from zipserve.kernels.attention.reference import decode_attention_reference
from zipserve.kernels.zipformat import ZipFormat

__all__ = [
    "DecodeStep",
    "OpenBlocks",
    "RawFormat",
    "SealedBlocks",
    "decode_attention",
    "decode_attention_reference",
]


@dataclass(frozen=True)
class RawFormat:
    """Blocks as they were computed. One layer: per KV head K [block_tokens, key_dim], then V, in `dtype`."""

    kv_heads: int
    key_dim: int
    value_dim: int
    block_tokens: int
    dtype: torch.dtype

    @property
    def layer_bytes(self) -> int:
        """Size of one layer of a block."""
        return self.kv_heads * self.block_tokens * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def decode(self, data: torch.Tensor, slabs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, kv_heads, block_tokens, dim] of blocks.

        Args:
            data: uint8 [slabs, layer_bytes].
            slabs: int64 [n].
        """
        heads = torch.unflatten(data.index_select(0, slabs).view(self.dtype), 1, (self.kv_heads, -1))
        border = self.block_tokens * self.key_dim
        return (
            torch.unflatten(heads[..., :border], 2, (self.block_tokens, self.key_dim)),
            torch.unflatten(heads[..., border:], 2, (self.block_tokens, self.value_dim)),
        )


@dataclass(frozen=True)
class SealedBlocks:
    """One layer of all sealed blocks, and which of them each row reads."""

    form: ZipFormat | RawFormat
    data: torch.Tensor
    """uint8 [slabs, form.layer_bytes]: this layer in all slabs; a view with any stride between slabs."""
    table: torch.Tensor
    """int32 [rows, columns]: slabs of each row's blocks, ascending positions; the first `counts` of a row count."""
    counts: torch.Tensor
    """int32 [rows]: sealed blocks of each row."""
    starts: torch.Tensor
    """int32 [rows]: position of the first token of column 0, a multiple of block_tokens."""
    sinks: torch.Tensor
    """uint8 [slabs, form.sinks_layer_bytes], likewise; ignored by RawFormat."""
    sink_slabs: torch.Tensor
    """int32 [rows]: slab of the sinks of a row whose `starts` is 0 and whose count is not; ignored for others."""


@dataclass(frozen=True)
class OpenBlocks:
    """One layer of all open blocks, and which of them each row reads."""

    keys: torch.Tensor
    """[slots, kv_heads, block_tokens, key_dim], any float dtype, contiguous in the last two dimensions."""
    values: torch.Tensor
    """[slots, kv_heads, block_tokens, value_dim], likewise."""
    slots: torch.Tensor
    """int32 [rows]."""
    counts: torch.Tensor
    """int32 [rows]: tokens of the open block, the row's own, at the last place, included; from 1 on."""


def decode_attention(
    query: torch.Tensor,
    sealed: SealedBlocks,
    open_blocks: OpenBlocks,
    first: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    with_weights: bool = False,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one query per row.

    A row's keys are those of its sealed blocks and, at the positions after them, those of its open block.

    Args:
        query: float [rows, heads, key_dim]; heads is a multiple of kv_heads.
        first: int32 [rows]: lowest position that the row sees; it lies in the block of column 0 or in the open block.
        scale: of the products.
        softcap: scores s become softcap * tanh(s / softcap).
        sink_logits: [heads]: one more logit per head that takes part in the softmax and has no value.
        with_weights: also return the softmax weights of the open block.
        fresh: keys [rows, kv_heads, key_dim] and values [rows, kv_heads, value_dim] of the rows' own tokens, which are
            written to the last places of the open blocks first; None: they stand there.

    Returns:
        float32 [rows, heads, value_dim]; and float32 [rows, block_tokens]: the weight of each token of the open block,
        mean over heads, 0 behind its last token. None without `with_weights`.

    Raises:
        ValueError: shapes that do not fit each other, on the CPU.
        IndexError: a row refers to a slab or slot that does not exist, or sees no key, on the CPU.
    """
    if runs_on_cpu(query, sealed, open_blocks):
        return decode_attention_cpu(
            query, sealed, open_blocks, first, scale=scale, softcap=softcap, sink_logits=sink_logits,
            with_weights=with_weights, fresh=fresh,
        )  # fmt: skip
    if fresh is not None:
        _append(open_blocks, fresh)
    if query.is_cuda:
        from zipserve.kernels.attention.triton_kernel import decode_attention_triton  # noqa: PLC0415  a CPU needs no Triton

        return decode_attention_triton(
            query, sealed, open_blocks, first, scale=scale, softcap=softcap, sink_logits=sink_logits,
            with_weights=with_weights,
        )  # fmt: skip
    return decode_attention_reference(
        query, sealed, open_blocks, first, scale=scale, softcap=softcap, sink_logits=sink_logits,
        with_weights=with_weights,
    )  # fmt: skip


class DecodeStep:
    """Decode attention of one step: all its layers read the same rows of the same blocks.

    What the layers have in common is checked and laid out once, which leaves little to do before each kernel.
    """

    def __init__(self, sealed: SealedBlocks, open_blocks: OpenBlocks, first: torch.Tensor) -> None:
        """See `decode_attention`, with a dimension of layers more.

        Args:
            sealed: its data [slabs, layers, form.layer_bytes], its sinks [slabs, layers, form.sinks_layer_bytes].
            open_blocks: keys [layers, slots, kv_heads, block_tokens, key_dim], and values likewise.
        """
        self._sealed, self._open, self._first = sealed, open_blocks, first
        self._call: Call | None = None
        of_layers = ((sealed.data, 1), (sealed.sinks, 1), (open_blocks.keys, 0), (open_blocks.values, 0))
        self._addresses = [
            (blocks.data_ptr(), blocks.stride(layers) * blocks.element_size()) for blocks, layers in of_layers
        ]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        *,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `decode_attention`; the shape of `query` is the same in all layers.

        Args:
            weights: where to write the softmax weights of the open block, float32 [rows, block_tokens].
        """
        call = self.call_of(layer, query)
        if call is None:
            output, found = decode_attention(
                query, *self._of(layer), self._first, scale=scale, softcap=softcap, sink_logits=sink_logits,
                with_weights=weights is not None, fresh=fresh,
            )  # fmt: skip
            if weights is not None and found is not None:
                weights.copy_(found)
            return output
        return call.run(query, fresh, scale=scale, softcap=softcap, sink_logits=sink_logits, weights=weights)

    @property
    def block_tokens(self) -> int:
        """Of the blocks."""
        return self._sealed.form.block_tokens

    def heads(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of rows of query heads, key heads and value heads: [rows, heads, dim] each.

        Raises:
            ValueError: that is not what such rows hold.
        """
        form, columns = self._sealed.form, rows.shape[1]
        of_values = form.kv_heads * form.value_dim
        if columns <= of_values or (columns - of_values) % form.key_dim:
            raise ValueError(f"rows of {columns} numbers do not hold heads of {form}")
        keys_and_queries = torch.unflatten(rows[:, :-of_values], 1, (-1, form.key_dim))
        values = torch.unflatten(rows[:, -of_values:], 1, (form.kv_heads, form.value_dim))
        return keys_and_queries[:, : -form.kv_heads], keys_and_queries[:, -form.kv_heads :], values

    def call_of(self, layer: int, query: torch.Tensor) -> Call | None:
        """What the C kernel is called with, for queries of this shape; None where it cannot do this."""
        if self._call is None:
            sealed, open_blocks = self._of(layer)
            if runs_on_cpu(query, sealed, open_blocks):
                self._call = Call(query, sealed, open_blocks, self._first)
                self._call.set_layers(*(stride for _, stride in self._addresses))
        if self._call is not None:
            self._call.move(*(address + layer * stride for address, stride in self._addresses))
        return self._call

    def _of(self, layer: int) -> tuple[SealedBlocks, OpenBlocks]:
        sealed, open_blocks = self._sealed, self._open
        return (
            replace(sealed, data=sealed.data[:, layer], sinks=sealed.sinks[:, layer]),
            replace(open_blocks, keys=open_blocks.keys[layer], values=open_blocks.values[layer]),
        )


def _append(open_blocks: OpenBlocks, fresh: tuple[torch.Tensor, torch.Tensor]) -> None:
    slots, places = open_blocks.slots.long(), open_blocks.counts.long() - 1
    for blocks, rows in zip((open_blocks.keys, open_blocks.values), fresh, strict=True):
        blocks[slots, :, places] = rows.to(blocks.dtype)
