"""What the claims are compared with: saliency from the whole attention matrix, and blocks decoded before each use."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from zipserve.engine.attention import Scoring
from zipserve.engine.cache import KvCache
from zipserve.engine.chunk import Chunk

TILE_TOKENS = 512
"""Rows whose weights exist at once."""


class FullScoresChunk(Chunk):
    """A prompt whose saliency is every row's attention, as in the adaptive methods before ZipCache.

    They need the weights of all rows, which fast attention does not give: these are computed in tiles of rows, and both
    the output and the scores are taken from them.
    """

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See Chunk.attend; of a prompt from position 0 on, whose rows see all before them."""
        output, columns = _full_attention(query, key, value, scoring.scale)
        # Column sums of the whole matrix, normalized by the number of rows that see each token.
        normalized = columns / torch.arange(len(columns), 0, -1)
        size = self._cache.layout.block_tokens
        padded = torch.nn.functional.pad(normalized, (0, -len(columns) % size))
        self._write(layer, key, value, padded.view(-1, size))
        return output


def _full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [tokens, heads, value_dim], and the sum of every column of its weights, mean over heads [tokens]."""
    heads, tokens = query.shape[:2]
    grouped = torch.unflatten(query * scale, 0, (len(key), -1))  # [kv heads, group, tokens, key_dim]
    output = query.new_empty(heads, tokens, value.shape[2])
    columns = torch.zeros(tokens)
    positions = torch.arange(tokens)
    for start in range(0, tokens, TILE_TOKENS):
        end = min(start + TILE_TOKENS, tokens)
        rows = grouped[:, :, start:end].flatten(1, 2)
        products = torch.matmul(rows, key[:, :end].transpose(1, 2)).view(heads, end - start, end)
        products.masked_fill_(positions[:end] > positions[start:end, None], -torch.inf)
        weights = torch.softmax(products, -1, out=products)
        columns[:end] += weights.sum((0, 1))
        found = torch.matmul(weights.view(len(key), -1, end), value[:, :end])
        output[:, start:end] = found.view(heads, end - start, -1)
    return output.transpose(0, 1), columns / heads


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
