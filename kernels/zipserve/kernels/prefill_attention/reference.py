"""The definition of prefill attention: decode the blocks, then attend."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from zipserve.kernels.dequantize.reference import dequantize_reference
from zipserve.kernels.zipformat import ZipFormat

if TYPE_CHECKING:
    from zipserve.kernels.prefill_attention import Prefix


def prefill_attention_reference(
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
    keys, values = with_prefix(prefix, key.float(), value.float(), dequantize_reference)
    group, tokens = query.shape[0] // keys.shape[0], query.shape[1]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.matmul(query.float() * scale, keys.mT)  # [heads, tokens, keys]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    own = start + torch.arange(tokens, device=query.device)
    positions = start + torch.arange(tokens - keys.shape[1], tokens, device=query.device)
    hidden = positions > own[:, None]
    if first is not None:
        hidden |= positions < first[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.float()[:, None, None].expand(-1, tokens, 1)), 2)
    output = torch.matmul(scores.softmax(2)[..., : keys.shape[1]], values).transpose(0, 1).contiguous()
    return output, None if lse_rows is None else scores[:, lse_rows].logsumexp(2)


def with_prefix(
    prefix: "Prefix | None",
    key: torch.Tensor,
    value: torch.Tensor,
    dequantize: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the prefix and behind it, in the dtype of the latter."""
    if prefix is None:
        return key, value
    if isinstance(prefix.form, ZipFormat):
        past = dequantize(prefix.data, prefix.slabs, prefix.form, prefix.sinks, prefix.sink_slabs)
    else:
        past = prefix.form.decode(prefix.data, prefix.slabs)
    past_key, past_value = (part.to(key.dtype).transpose(0, 1).flatten(1, 2) for part in past)
    return torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
