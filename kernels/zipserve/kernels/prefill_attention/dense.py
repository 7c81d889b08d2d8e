"""Prefill attention by torch's own, over a dequantized prefix: on GPUs, and where no C compiler exists."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

from zipserve.kernels.dequantize import dequantize
from zipserve.kernels.prefill_attention.reference import with_prefix
from zipserve.kernels.saliency import log_sum_exp

if TYPE_CHECKING:
    from zipserve.kernels.prefill_attention import Prefix

TILE_TOKENS = 512
"""Queries that share one mask: bounds its memory, and lets windows skip the keys that no query of a tile sees."""


def prefill_attention_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    *,
    scale: float,
    prefix: "Prefix | None",
    first: torch.Tensor | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    lse_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See zipserve.kernels.prefill_attention.prefill_attention."""
    key, value = with_prefix(prefix, key, value, dequantize)
    tokens, begin = query.shape[1], start + query.shape[1] - key.shape[1]
    least = torch.zeros(tokens, dtype=torch.int64, device=query.device) if first is None else first.long() - begin
    own = torch.arange(tokens, device=query.device) + (start - begin)
    outputs = []
    if first is None and tokens == key.shape[1] and softcap is None and sink_logits is None:
        outputs.append(_attend(query, key, value, None, scale, None, None))  # torch is fastest without a mask
    else:
        lowest = [0] * tokens if first is None else (first[::TILE_TOKENS] - begin).clamp_min(0).tolist()
        for tile, at in enumerate(range(0, tokens, TILE_TOKENS)):
            rows, keys = slice(at, at + TILE_TOKENS), slice(lowest[tile], start - begin + min(at + TILE_TOKENS, tokens))
            index = torch.arange(keys.start, keys.stop, device=query.device)
            seen = (index >= least[rows, None]) & (index <= own[rows, None])
            outputs.append(_attend(query[:, rows], key[:, keys], value[:, keys], seen, scale, softcap, sink_logits))
    output = torch.cat(outputs, 1).transpose(0, 1).float()
    if lse_rows is None:
        return output, None
    queries = query.index_select(1, lse_rows)
    return output, log_sum_exp(queries, key, own[lse_rows], least[lse_rows], scale, softcap, sink_logits)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """[heads, queries, value_dim]; seen: bool [queries, keys], or, without softcap and sinks, None: causal."""
    groups = query.shape[0] // key.shape[0]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    if softcap is None and sink_logits is None:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=seen, is_causal=seen is None, scale=scale
        )[0]
    assert seen is not None
    scores = torch.matmul(query * scale, key.transpose(1, 2)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.float()[:, None, None].expand(-1, scores.shape[1], 1)), -1)
    return torch.matmul(scores.softmax(-1)[..., : key.shape[1]].to(value.dtype), value)
