"""Draws tokens. The token at a position depends on its logits, its sequence's tokens and parameters, and (seed,
position) only.

So a request gives the same tokens whatever runs beside it, and goes on with the same tokens when another worker takes
it over. What is asked for is applied in this order:

1. the repetition penalty, then the frequency and presence penalties (zipserve.engine.penalties);
2. logit_bias is added; tokens that the guide does not allow become -inf (zipserve.common.guide_matcher), and so do the
   ids that end the sequence while it has fewer than min_tokens generated tokens, unless nothing else is left;
3. the logits are divided by the temperature; 0 takes the highest one and ends here;
4. top_k keeps the k most likely tokens;
5. top_p keeps, of these, the smallest set of most likely ones whose share of their probability reaches it;
6. min_p keeps, of these, the ones that are at least min_p times as likely as the most likely one;
7. a token is drawn by the probabilities of those kept.

Of equally likely tokens, the lower id counts as the more likely one. Log-probabilities are of the logits before all of
this.
"""

import hashlib
import struct
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zipserve.common.errors import InternalError, InvalidRequestError, ZipserveError
from zipserve.common.guide_matcher import GuideMatcher
from zipserve.common.sampling import Sampling
from zipserve.engine.logprobs import token_logprobs
from zipserve.engine.penalties import TokenCounts
from zipserve.v1.sampling_pb2 import TokenLogprobs

_CANDIDATES = (256, 4096)
"""How many tokens are sorted at first: nearly always enough, where sorting a whole vocabulary takes milliseconds."""

_Floats = npt.NDArray[np.float32]
_Tokens = npt.NDArray[np.int64]


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(
        self,
        params: Sampling,
        past: SequenceOf[int] = (),
        *,
        prompt_tokens: int = 0,
        min_tokens: int = 0,
        stop_token_ids: Iterable[int] = (),
        guide: GuideMatcher | None = None,
    ) -> None:
        """
        Args:
            past: ids of the sequence so far; only looked at if `params` has a penalty.
            prompt_tokens: how many of the sequence's tokens are the client's prompt; what follows was generated.
            min_tokens: none of `stop_token_ids` is among so many first generated tokens.
            guide: says which tokens may be drawn; it has followed those that were generated. Of its ids that end a
                sequence, those that are not in `stop_token_ids` are drawn only where nothing else may come.

        Raises:
            InvalidRequestError: there is a penalty or min_tokens, and prompt_tokens cannot be right.
        """
        if (params.penalizes and not 1 <= prompt_tokens <= len(past)) or (min_tokens and not prompt_tokens):
            raise InvalidRequestError(
                f"prompt_tokens is {prompt_tokens} of {len(past)} tokens, which penalties and min_tokens count from",
                field="prompt_tokens",
            )
        self.params = params
        self._counts = TokenCounts(past[:prompt_tokens], past[prompt_tokens:]) if params.penalizes else None
        self._free_from = prompt_tokens + min_tokens
        stops, ends = set(stop_token_ids), set(guide.eos_token_ids if guide else ())
        self._avoided_first = np.array(sorted(stops | ends if min_tokens else ends - stops), np.int64)
        self._avoided = np.array(sorted(ends - stops), np.int64)
        self._guide = guide
        self._bias_ids = np.array([token_id for token_id, _ in params.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)

    @property
    def ended(self) -> bool:
        """Whether the guide is complete with what was appended, and lets nothing follow."""
        return self._guide is not None and self._guide.ended

    def look_ahead(self, executor: Executor) -> None:
        """Begins to find out in another thread what may be drawn next, if that takes any finding out."""
        if self._guide is not None:
            self._guide.look_ahead(executor)

    def append(self, token_id: int) -> None:
        """Takes note of a generated token: the next one is drawn after it.

        Raises:
            InvalidRequestError: the guide cannot be followed any further.
        """
        if self._counts is not None:
            self._counts.add(token_id)
        if self._guide is not None:
            self._guide.advance(token_id)

    def draw(self, logits: _Floats, position: int) -> int:
        """The token at a position, from float32 logits [vocab] without NaN, which are not changed.

        Raises:
            InvalidRequestError: the guide cannot be followed any further.
            InternalError: the model rules out all that the guide allows.
        """
        logits = self._adjusted(logits, position)
        highest = int(logits.argmax())  # the first one, if several are highest
        if self.params.temperature == 0.0 or self.params.top_k == 1:
            return highest
        return _draw(logits, float(logits[highest]), self.params, uniform(self.params.seed, position))

    def _adjusted(self, logits: _Floats, position: int) -> _Floats:
        """Steps 1 and 2."""
        avoided = self._avoided_first if position < self._free_from else self._avoided
        if self._counts is None and not len(self._bias_ids) and not len(avoided) and self._guide is None:
            return logits
        logits = logits.copy()
        avoided = avoided[avoided < len(logits)]
        if self._counts is not None:
            self._counts.penalize(logits, self.params)
        logits[self._bias_ids] += self._bias
        if self._guide is not None:
            logits[~self._guide.allowed()] = -np.inf
        held = logits[avoided]
        logits[avoided] = -np.inf
        if logits.max() == -np.inf:
            logits[avoided] = held  # there is nothing else to draw
            if self._guide is not None and logits.max() == -np.inf:
                raise InternalError("the model rules out every token that the guide allows")
        return logits


@dataclass(frozen=True)
class Drawn:
    """A token, with its log-probabilities if they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    complete: bool = False
    """Whether it completes what the guide asks for, so that nothing may follow."""


def draw(
    logits: torch.Tensor, samplers: SequenceOf[Sampler], positions: SequenceOf[int]
) -> list[Drawn | ZipserveError]:
    """Draws one token per row, like `sample`, appends it, and finds the log-probabilities that are asked for. Where a
    guide fails, that row has its error."""
    rows = logits.float().cpu().numpy()
    outcomes: list[Drawn | ZipserveError] = [_try_draw(*row) for row in zip(samplers, rows, positions, strict=True)]
    token_ids = {row: outcome.token_id for row, outcome in enumerate(outcomes) if isinstance(outcome, Drawn)}
    wanted = {row: s.params.logprobs for row, s in enumerate(samplers) if s.params.logprobs is not None}
    for top in set(wanted.values()):
        of_top = [row for row, of_row in wanted.items() if of_row == top and row in token_ids]
        found = token_logprobs(logits[of_top], [token_ids[row] for row in of_top], top)
        for row, logprobs in zip(of_top, found, strict=True):
            outcomes[row] = Drawn(token_ids[row], logprobs, samplers[row].ended)
    return outcomes


def _try_draw(sampler: Sampler, logits: _Floats, position: int) -> Drawn | ZipserveError:
    try:
        token_id = sampler.draw(logits, position)
        sampler.append(token_id)
    except ZipserveError as error:
        return error
    return Drawn(token_id, complete=sampler.ended)


def sample(logits: torch.Tensor, samplers: SequenceOf[Sampler], positions: SequenceOf[int]) -> list[int]:
    """Draws one token per row.

    Args:
        logits: [n, vocab], no NaN.
        samplers: of each row's sequence.
        positions: of each row: where in its sequence the new token will stand.
    """
    rows = logits.float().cpu().numpy()
    return [sampler.draw(row, position) for row, sampler, position in zip(rows, samplers, positions, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random: 53 bits of a hash of seed and position."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, person=b"zipserve.sample").digest()
    return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)


def _draw(logits: _Floats, top: float, params: Sampling, share: float) -> int:
    """The token at `share` of the filtered distribution, tokens in the order of their ids.

    Not in the order of their weights: that of nearly equal ones changes with the rounding of another batch or worker.
    """
    with np.errstate(over="ignore", under="ignore"):  # at a tiny temperature the others become -inf, then 0
        weights = np.exp((logits - np.float32(top)) / np.float32(params.temperature))
    tokens = _kept(logits, weights, params)
    mass = np.cumsum(weights if tokens is None else weights[tokens], dtype=np.float64)
    index = int(np.searchsorted(mass, share * mass[-1], side="right"))
    if index == len(mass):  # by rounding: it is the last token that has any weight
        index = int(np.searchsorted(mass, mass[-1]))
    return index if tokens is None else int(tokens[index])


def _kept(logits: _Floats, weights: _Floats, params: Sampling) -> _Tokens | None:
    """Ids of the tokens that top_k, top_p and min_p leave, rising; None for all.

    Looks at the most likely tokens only, as many as decide. They are a prefix of the whole order, so that the result
    does not depend on how many they are.
    """
    if not params.top_k and params.top_p == 1.0 and not params.min_p:
        return None
    for count in (*_CANDIDATES, logits.size):
        if count < logits.size and params.top_k >= count:
            continue
        order = _most_likely(logits, count)[: params.top_k or None]
        complete = params.top_k > 0 or len(order) == logits.size
        kept = len(order)
        if params.top_p < 1.0:
            mass = np.cumsum(weights[order], dtype=np.float64)
            total = mass[-1] if complete else weights.sum(dtype=np.float64)
            kept = min(kept, int(np.searchsorted(mass, params.top_p * total)) + 1)  # the smallest that reaches it
        if params.min_p > 0.0:
            kept = min(kept, int(np.searchsorted(-weights[order], -params.min_p, side="right")))
        if complete or kept < len(order):
            return np.sort(order[:kept])
    raise AssertionError("the whole vocabulary decides")


def _most_likely(logits: _Floats, count: int) -> _Tokens:
    """At least `count` most likely tokens, ties with the last included, by falling logit, then by rising id."""
    if count >= logits.size:
        return np.argsort(-logits, kind="stable")
    # As many columns hold a logit of at least the threshold; ordering their maxima is cheaper than ordering all.
    columns = 3 * count
    depth = logits.size // columns
    maxima = logits[: depth * columns].reshape(depth, columns).max(0) if depth > 1 else logits
    threshold = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    tokens = np.flatnonzero(logits >= threshold)
    return tokens[np.argsort(-logits[tokens], kind="stable")]
