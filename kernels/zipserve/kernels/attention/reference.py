"""The definition of decode attention: decode the blocks, then attend, row by row."""

from typing import TYPE_CHECKING

import torch

from zipserve.kernels.dequantize.reference import dequantize_reference
from zipserve.kernels.zipformat import ZipFormat

if TYPE_CHECKING:
    from zipserve.kernels.attention import OpenBlocks, SealedBlocks


def decode_attention_reference(
    query: torch.Tensor,
    sealed: "SealedBlocks",
    open_blocks: "OpenBlocks",
    first: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See zipserve.kernels.attention.decode_attention."""
    rows, heads = query.shape[:2]
    output = torch.empty(rows, heads, open_blocks.values.shape[-1], device=query.device)
    weights = torch.zeros(rows, sealed.form.block_tokens, device=query.device)
    for row in range(rows):
        slot, open_count = int(open_blocks.slots[row]), int(open_blocks.counts[row])
        past_keys, past_values = _sealed(sealed, row)
        keys = torch.cat((past_keys, open_blocks.keys[slot, :, :open_count].float()), 1)
        values = torch.cat((past_values, open_blocks.values[slot, :, :open_count].float()), 1)
        groups = heads // keys.shape[0]
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        scores = (keys * (query[row].float() * scale)[:, None]).sum(-1)  # [heads, keys]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        positions = int(sealed.starts[row]) + torch.arange(keys.shape[1], device=query.device)
        scores = scores.masked_fill(positions < first[row], -torch.inf)
        if sink_logits is not None:
            scores = torch.cat((scores, sink_logits.float()[:, None]), 1)
        shares = scores.softmax(-1)[:, : keys.shape[1]]
        output[row] = torch.matmul(shares[:, None], values)[:, 0]
        weights[row, :open_count] = shares[:, -open_count:].mean(0)
    return output, weights if with_weights else None


def _sealed(sealed: "SealedBlocks", row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [kv_heads, tokens, dim] of a row's sealed blocks, float32."""
    form, count = sealed.form, int(sealed.counts[row])
    slabs = sealed.table[row, :count].long()
    if isinstance(form, ZipFormat):
        sink_slabs = torch.full_like(slabs, -1)
        if count and int(sealed.starts[row]) == 0:
            sink_slabs[0] = sealed.sink_slabs[row]
        keys, values = dequantize_reference(sealed.data, slabs, form, sealed.sinks, sink_slabs)
    else:
        keys, values = (part.float() for part in form.decode(sealed.data, slabs))
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)
