"""What the claims are compared with: saliency from the whole attention matrix, and blocks decoded before each use."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from zipserve.engine.attention import Scoring
from zipserve.engine.cache import KvCache
from zipserve.engine.chunk import Chunk
from zipserve.engine.sequence import Sequence


class FullScoresChunk(Chunk):
    """A prompt whose saliency is every row's attention, as in the adaptive methods before ZipCache.

    They need the whole matrix, so it is computed once, and both the output and the scores are taken from it.
    """

    def __init__(self, sequence: Sequence, tokens: int, cache: KvCache) -> None:
        super().__init__(sequence, tokens, cache)
        self._weights = torch.empty(0)
        self._probes = self  # type: ignore[assignment]  # asked for scores in the place of probe rows

    def _over_past(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, offset: int
    ) -> torch.Tensor:
        groups, tokens = query.shape[0] // key.shape[0], query.shape[1]
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        products = torch.matmul(query * scoring.scale, key.transpose(1, 2))
        self._weights = products.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf).softmax(
            -1
        )
        return torch.matmul(self._weights, value)

    def scores(self, query: torch.Tensor, keys: torch.Tensor, scoring: Scoring, offset: int) -> torch.Tensor:
        """Column sums of the whole matrix; normalized by the number of rows that see each token."""
        tokens = query.shape[1]
        columns = self._weights.sum(1).mean(0) / torch.arange(tokens, 0, -1)
        size = self._cache.layout.block_tokens
        blocks = -(-tokens // size)
        return torch.nn.functional.pad(columns, (0, blocks * size - tokens)).view(blocks, size)


@contextmanager
def full_scores() -> Iterator[None]:
    """Prompts are computed as `FullScoresChunk`, from position 0 only."""
    with mock.patch("zipserve.engine.batch.Chunk", FullScoresChunk):
        yield


@contextmanager
def decoded_first(cache: KvCache) -> Iterator[None]:
    """Decode rows decode their blocks before they attend, as methods do whose attention knows no codes."""
    with mock.patch.object(cache.codec, "sealed", return_value=None):
        yield
