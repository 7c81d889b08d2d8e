"""Log-probabilities of tokens under the model's own logits, and of the most likely tokens beside them."""

from collections.abc import Sequence as SequenceOf

import torch

from zipserve.v1.sampling_pb2 import TokenLogprobs

_ROWS = 64
"""Logits that are taken at once: a log-softmax of a whole prompt would need as much memory as its logits."""


def prompt_logprobs(logits: torch.Tensor, prompt: SequenceOf[int], start: int, top: int) -> list[TokenLogprobs]:
    """Those of the tokens that follow a chunk's; after the prompt's last token there is none.

    Args:
        logits: float32 [chunk's tokens, vocab].
        start: position of the chunk's first token in `prompt`.
        top: see `token_logprobs`.
    """
    following = prompt[start + 1 : start + len(logits) + 1]
    return token_logprobs(logits[: len(following)], following, top)


def token_logprobs(logits: torch.Tensor, token_ids: SequenceOf[int], top: int) -> list[TokenLogprobs]:
    """The log-softmax of each row at its token and at the row's `top` highest logits, highest first.

    Args:
        logits: float32 [n, vocab].
        token_ids: of each row.
        top: at least 0; more than the vocabulary has are not found.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _ROWS):
        rows = logits[start : start + _ROWS]
        chosen = torch.tensor(token_ids[start : start + _ROWS], device=rows.device)
        totals = rows.logsumexp(-1, keepdim=True)
        values, ids = rows.topk(min(top, rows.shape[1]))
        own = (rows.gather(1, chosen[:, None]) - totals)[:, 0]
        found += [
            TokenLogprobs(logprob=logprob, top_token_ids=top_ids, top_logprobs=top_logprobs)
            for logprob, top_ids, top_logprobs in zip(
                own.tolist(), ids.tolist(), (values - totals).tolist(), strict=True
            )
        ]
    return found
