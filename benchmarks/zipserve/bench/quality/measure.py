"""Drives the engine: one exact pass over each window, then the same tokens once per codec."""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from zipserve.bench.quality.fan import Fan
from zipserve.bench.quality.metrics import Exact, Score, agreement, score
from zipserve.bench.quality.windows import Window
from zipserve.common.errors import ZipserveError
from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.model import LoadedModel
from zipserve.engine.sequence import Segment, Sequence

CONTROL = "raw"
"""The codec that keeps KV as it is: its scores show what the path through the cache does by itself."""


class Batch:
    """Windows of one genre: prefilled exactly, and sealed by every codec."""

    def __init__(
        self, model: LoadedModel, windows: SequenceOf[Window], codecs: SequenceOf[str], greedy_tokens: int
    ) -> None:
        """
        Args:
            windows: at least one.
            codecs: names, with or without CONTROL.
            greedy_tokens: generated from every context; may be 0.

        Raises:
            KvValueError: a codec cannot hold the KV of a window.
        """
        layout = model.layout()
        per_window = max(
            max(layout.blocks_for(len(window.token_ids)), layout.blocks_for(window.context_tokens + greedy_tokens + 1))
            for window in windows
        )
        cache = KvCache(layout, per_window * len(windows), 0, len(windows), device=model.device)
        self._fan = Fan(model, {CONTROL, *codecs}, cache, len(windows))
        cache.codec = self._fan
        self._engine = Engine(model, cache)
        self._windows = windows
        self._greedy_tokens = greedy_tokens
        self._sequences = [
            Sequence(list(range(i * per_window, (i + 1) * per_window)), slot=i, sinks=i) for i in range(len(windows))
        ]
        self._first: list[int] = []
        """Of each window the token that the model finds most likely after its context."""
        self._exact = [self._prefill(window, seq) for window, seq in zip(windows, self._sequences, strict=True)]
        self._generated = self._generate(CONTROL)

    def scores(self, codec: str) -> list[Score]:
        """Of each window, what the codec changes."""
        found = []
        for window, sequence, exact in zip(self._windows, self._sequences, self._exact, strict=True):
            self._rewind(codec)
            found.append(score(self._engine.logits_of(Segment(sequence, window.scored)), exact))
        if not self._greedy_tokens:
            return found
        generated = self._generated if codec == CONTROL else self._generate(codec)
        shares = map(agreement, self._generated, generated)
        return [replace(of_window, greedy=share) for of_window, share in zip(found, shares, strict=True)]

    def _prefill(self, window: Window, sequence: Sequence) -> Exact:
        """One pass over context and scored tokens without any cache: exact logits, and every codec's blocks."""
        self._fan.select(None)
        logits = self._engine.logits_of(Segment(sequence, window.token_ids[:-1]))
        self._first.append(int(logits[window.context_tokens - 1].argmax()))
        return Exact.of(logits[window.context_tokens :], window.targets, window.answers)

    def _generate(self, codec: str) -> list[list[int]]:
        """Greedy tokens after each context: those of a decode worker, all windows in one batch."""
        self._rewind(codec)
        generated: list[list[int]] = [[] for _ in self._windows]
        tokens = self._first
        for _ in range(self._greedy_tokens):
            step = self._engine.forward(
                [Segment(sequence, [token]) for sequence, token in zip(self._sequences, tokens, strict=True)]
            )
            _raise_any(step.failed)
            tokens = step.logits.argmax(-1).tolist()
            for of_window, token in zip(generated, tokens, strict=True):
                of_window.append(token)
        return generated

    def _rewind(self, codec: str) -> None:
        """Back to the ends of the contexts, coded by `codec`."""
        self._fan.select(codec)
        for window, sequence in zip(self._windows, self._sequences, strict=True):
            sequence.length = window.context_tokens


def _raise_any(failed: dict[int, ZipserveError]) -> None:
    for error in failed.values():
        raise error
