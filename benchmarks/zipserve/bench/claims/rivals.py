"""What the claims are compared with: saliency from the whole attention matrix, and blocks decoded before each use."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from zipserve.engine.attention import Scoring
from zipserve.engine.cache import KvCache
from zipserve.engine.chunk import TILE_TOKENS, Chunk
from zipserve.engine.sequence import Sequence


class FullScoresChunk(Chunk):
    """A prompt whose saliency is every row's attention, as in the adaptive methods before ZipCache.

    They need the weights of all rows, which SDPA does not give: these are computed in tiles of rows, as the engine
    tiles long prompts, and both the output and the scores are taken from them.
    """

    def __init__(self, sequence: Sequence, tokens: int, cache: KvCache) -> None:
        super().__init__(sequence, tokens, cache)
        self._columns = torch.empty(0)
        self._probes = self  # type: ignore[assignment]  # asked for scores in the place of probe rows

    def _over_past(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, offset: int
    ) -> torch.Tensor:
        heads, tokens = query.shape[:2]
        grouped = torch.unflatten(query * scoring.scale, 0, (len(key), -1))  # [kv heads, group, tokens, key_dim]
        output = query.new_empty(heads, tokens, value.shape[2])
        self._columns = torch.zeros(tokens)
        for start in range(0, tokens, TILE_TOKENS):
            end = min(start + TILE_TOKENS, tokens)
            rows = grouped[:, :, start:end].flatten(1, 2)
            products = torch.matmul(rows, key[:, :end].transpose(1, 2)).view(heads, end - start, end)
            products.masked_fill_(~self._mask(scoring.visibility, start, end), -torch.inf)
            weights = torch.softmax(products, -1, out=products)
            self._columns[:end] += weights.sum((0, 1))
            found = torch.matmul(weights.view(len(key), -1, end), value[:, :end])
            output[:, start:end] = found.view(heads, end - start, -1)
        self._columns /= heads
        return output

    def scores(self, query: torch.Tensor, keys: torch.Tensor, scoring: Scoring, offset: int) -> torch.Tensor:
        """Column sums of the whole matrix; normalized by the number of rows that see each token."""
        tokens, size = query.shape[1], self._cache.layout.block_tokens
        columns = self._columns / torch.arange(tokens, 0, -1)
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
