"""Draws tokens. The token at a position depends on its logits, its sampling parameters and (seed, position) only.

So a request gives the same tokens whatever runs beside it, and goes on with the same tokens when another worker takes
it over.
"""

import hashlib
import struct
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch

from zipserve.common.sampling import Sampling

_CANDIDATES = (256, 4096)
"""How many tokens are sorted at first: nearly always enough, where sorting a whole vocabulary takes milliseconds."""

_Floats = npt.NDArray[np.float32]
_Tokens = npt.NDArray[np.int64]


def sample(logits: torch.Tensor, params: SequenceOf[Sampling], positions: SequenceOf[int]) -> list[int]:
    """Draws one token per row.

    Args:
        logits: [n, vocab], no NaN.
        params: of each row.
        positions: of each row: where in its sequence the new token will stand.
    """
    rows = logits.float().cpu().numpy()
    return [_draw(row, of_row, position) for row, of_row, position in zip(rows, params, positions, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random: 53 bits of a hash of seed and position."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"zipserve.sample").digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def _draw(logits: _Floats, params: Sampling, position: int) -> int:
    if params.temperature == 0.0 or params.top_k == 1:
        return int(logits.argmax())  # the first one, if several are highest
    with np.errstate(over="ignore", under="ignore"):  # of a tiny temperature: the others become -inf, then 0
        # In float64: at a tiny temperature the scaled differences do not fit into float32.
        scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
        weights = np.exp(scaled)
    share = uniform(params.seed, position)
    for count in _CANDIDATES:
        if params.top_k < count < logits.size:
            token = _inverse_cdf(logits, weights, params, share, count)
            if token is not None:
                return token
    token = _inverse_cdf(logits, weights, params, share, logits.size)
    assert token is not None, "the whole vocabulary decides"
    return token


def _inverse_cdf(
    logits: _Floats, weights: npt.NDArray[np.float64], params: Sampling, share: float, count: int
) -> int | None:
    """The token at `share` of the filtered distribution, tokens in order of falling weight, then of rising id.

    Looks at the `count` most likely tokens only, which are more than top_k; None when they do not decide. They are a
    prefix of the whole order, and their running sum one of the whole sum: every `count` that decides gives one token.
    """
    order = _most_likely(logits, count)[: params.top_k or None]
    complete = params.top_k > 0 or len(order) == logits.size
    mass = np.cumsum(weights[order])
    total = mass[-1] if params.top_k else weights.sum()
    if params.top_p < 1.0:
        # The smallest prefix that reaches top_p.
        last = int(np.searchsorted(mass, params.top_p * total))
        if last < len(mass):
            total = mass[last]
        elif not complete:
            return None
    index = int(np.searchsorted(mass, share * total, side="right"))
    if index == len(mass):
        if not complete:
            return None
        # The sums differ by rounding: it is the last token that has any weight.
        index = int(np.searchsorted(mass, mass[-1]))
    return int(order[index])


def _most_likely(logits: _Floats, count: int) -> _Tokens:
    """The `count` most likely tokens, and those that tie with the last, by falling logit, then by rising id."""
    if count >= logits.size:
        return np.argsort(-logits, kind="stable")
    threshold = np.partition(logits, logits.size - count)[logits.size - count]
    tokens = np.flatnonzero(logits >= threshold)
    return tokens[np.argsort(-logits[tokens], kind="stable")]
