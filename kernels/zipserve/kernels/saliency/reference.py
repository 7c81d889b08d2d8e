"""The definition of probe saliency, in PyTorch."""

import torch


def probe_scores_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    block: torch.Tensor,
    starts: torch.Tensor,
    block_tokens: int,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """See zipserve.kernels.saliency.probe_scores."""
    scores = _scores(query, keys, own, first, scale, softcap)
    if lse is None:
        lse = _log_sum_exp(scores, sinks)
    weights = (scores - lse[..., None]).exp().mean(0)
    found = torch.zeros(len(starts), block_tokens, device=keys.device)
    for row, of in enumerate(block.tolist()):
        start = int(starts[of])
        columns = weights[row, start : start + block_tokens]
        found[of, : len(columns)] += columns
    return found


def log_sum_exp_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See zipserve.kernels.saliency.log_sum_exp."""
    return _log_sum_exp(_scores(query, keys, own, first, scale, softcap), sinks)


def _scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[heads, p, keys]; minus infinity where a row does not see a key."""
    groups = query.shape[0] // keys.shape[0]
    scores = torch.matmul(query.float() * scale, keys.float().repeat_interleave(groups, 0).transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    index = torch.arange(keys.shape[1], device=keys.device)
    visible = (index >= first[:, None]) & (index <= own[:, None])
    return scores.masked_fill(~visible, -torch.inf)


def _log_sum_exp(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)), -1)
    return scores.logsumexp(-1)
