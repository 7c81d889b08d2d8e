"""Probe saliency: how much attention a few probe rows of a block pay to each of its tokens.

ZipCache (2024), section 4: a token's saliency is the sum of its column of the attention matrix, divided by the number
of rows that can see it, estimated from a few rows. Here the rows are fixed ones of the same block
(zipformat.probe_offsets), so that a block's bytes depend on nothing but the tokens up to its end.
"""

import torch

from zipserve.kernels.saliency.cpu import probe_scores_cpu, runs_on_cpu
from zipserve.kernels.saliency.reference import log_sum_exp_reference, probe_scores_reference
from zipserve.kernels.zipformat import SINK_TOKENS, ZipFormat, probe_counts

__all__ = ["classify", "log_sum_exp", "probe_scores", "probe_scores_reference"]


def probe_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    block: torch.Tensor,
    starts: torch.Tensor,
    block_tokens: int,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that the probe rows of one sequence pay to the tokens of their blocks: sums of softmax weights.

    The softmax is the model's: over all keys that a row sees, in its block or before.

    Args:
        query: [heads, p, key_dim]: the probe rows.
        keys: [kv_heads, n, key_dim]: all keys that any of them sees, in the order of positions; with `lse` those of
            the blocks are enough.
        own: int64 [p]: index in `keys` of each row's own token, the last one that it sees.
        first: int64 [p]: index of the first key that it sees; with `lse` below 0 where that is not in `keys`.
        block: int64 [p], ascending: which block the row belongs to.
        starts: int64 [b]: index in `keys` of each block's first token. A block may end behind the last key.
        scale: of the products.
        softcap: scores s become softcap * tanh(s / softcap).
        sinks: [heads]: one more logit per head that takes part in the softmax and has no key.
        lse: float32 [heads, p]: what `log_sum_exp` gives for the rows, where it is known.

    Returns:
        float32 [b, block_tokens]: for each token of each block the sum over the block's rows of the weight, mean over
        heads; 0 where no row sees it.

    Raises:
        ValueError: shapes that do not fit each other, on the CPU.
        IndexError: a row's token or block does not exist, or blocks descend, on the CPU.
    """
    if query.is_cuda:
        from zipserve.kernels.saliency.triton_kernel import probe_scores_triton  # noqa: PLC0415  a CPU needs no Triton

        return probe_scores_triton(query, keys, own, first, block, starts, block_tokens, scale, softcap, sinks, lse)
    scores = probe_scores_cpu if runs_on_cpu(query) else probe_scores_reference
    return scores(query, keys, own, first, block, starts, block_tokens, scale, softcap, sinks, lse)


def log_sum_exp(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Natural logarithm of the sum of e^score over all keys that each row sees, and its sink logit.

    Args: as in `probe_scores`.

    Returns:
        float32 [heads, p].
    """
    if query.is_cuda:
        from zipserve.kernels.saliency.triton_kernel import log_sum_exp_triton  # noqa: PLC0415  a CPU needs no Triton

        return log_sum_exp_triton(query, keys, own, first, scale, softcap, sinks)
    return log_sum_exp_reference(query, keys, own, first, scale, softcap, sinks)


def classify(scores: torch.Tensor, form: ZipFormat, at_start: torch.Tensor) -> torch.Tensor:
    """The hi class of each block: the tokens of the highest normalized scores; of equal ones the first.

    Args:
        scores: float32 [n, block_tokens], as from `probe_scores`, of all probe rows of the blocks.
        at_start: bool [n]: the block starts at position 0, so that its first tokens are sinks, which count as hi.

    Returns:
        bool [n, block_tokens], form.hi_tokens of each block true. A profile without classes keeps the order.
    """
    if not form.bits.has_classes:
        return (torch.arange(form.block_tokens, device=scores.device) < form.hi_tokens).expand(len(scores), -1)
    normalized = scores / torch.tensor(probe_counts(form.block_tokens), device=scores.device)
    normalized[at_start, :SINK_TOKENS] = torch.inf
    best = normalized.argsort(dim=1, descending=True, stable=True)[:, : form.hi_tokens]
    return torch.zeros_like(normalized, dtype=torch.bool).scatter_(1, best, value=True)
