"""Sequences of equal context for measuring steps of the engine: one prompt is computed, the others get copies."""

import torch

from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.model import LoadedModel
from zipserve.engine.sequence import Segment, Sequence


def engine(model: LoadedModel, codec: str, tokens: int, rows: int) -> Engine:
    """With room for `rows` sequences of `tokens` tokens each."""
    layout = model.layout(codec=codec)
    return Engine(model, KvCache(layout, rows * layout.blocks_for(tokens), 0, rows))


def prompt(vocab_tokens: int, tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_tokens, (tokens,), generator=generator).tolist()


def compute(engine: Engine, ids: list[int]) -> tuple[Sequence, torch.Tensor]:
    """A prompt in the first slabs and slot 0: the sequence, and the logits after it, float32 [vocab]."""
    sequence = Sequence(list(range(engine.cache.layout.blocks_for(len(ids)))), 0, sinks=0)
    return sequence, engine.forward([Segment(sequence, ids)]).logits[0]


class Rows:
    """Rows of equal context, each with KV of its own, that take one step after another."""

    def __init__(self, model: LoadedModel, codec: str, *, context: int, rows: int, steps: int) -> None:
        """
        Args:
            steps: most that each row will take.
        """
        self.engine = engine(model, codec, context + steps, rows)
        first, logits = compute(self.engine, prompt(model.vocab_tokens, context))
        cache, filled = self.engine.cache, len(first.blocks)
        count = cache.blocks // rows
        self._sequences = []
        self._next = [int(logits.argmax())] * rows
        for row in range(rows):
            blocks = list(range(row * count, (row + 1) * count))
            if row:
                cache.arenas.blocks[row * count :][:filled] = cache.arenas.blocks[:filled]
                if cache.sinks:
                    cache.arenas.sinks[row] = cache.arenas.sinks[0]
                for opened in (cache.open_keys, cache.open_values, cache.open_scores):
                    opened[:, row] = opened[:, 0]
            self._sequences.append(Sequence(blocks, row, first.length, sinks=row))

    def step(self, rows: int | None = None) -> list[int]:
        """One token more, the most likely one, for the first `rows` rows, or for all; returns them."""
        segments = [Segment(sequence, [self._next[sequence.slot]]) for sequence in self._sequences[:rows]]
        tokens: list[int] = self.engine.forward(segments).logits.argmax(-1).tolist()
        self._next[: len(tokens)] = tokens
        return tokens
