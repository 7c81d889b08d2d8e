"""Runs steps: tokens of many sequences through the model, their KV into the cache, the logits back."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch

from zipserve.common.errors import InternalError, ZipserveError
from zipserve.engine.attention import attending
from zipserve.engine.batch import Batch
from zipserve.engine.cache import KvCache
from zipserve.engine.model import LoadedModel
from zipserve.engine.sequence import Segment


@dataclass(frozen=True)
class Step:
    """What a step computed."""

    logits: torch.Tensor
    """float32 [segments, vocab]: for the token that follows each segment; zeros where it failed."""
    every: dict[int, torch.Tensor]
    """float32 [tokens, vocab]: logits after each token of the segments that want them, by index."""
    failed: dict[int, ZipserveError]
    """Segments that failed, by index: their KV is lost, and their sequence's length is what it was."""


class Engine:
    """A model over a KV cache. One thread owns both."""

    def __init__(self, model: LoadedModel, cache: KvCache) -> None:
        """
        Raises:
            ValueError: the cache has another shape or dtype than the model's KV.
        """
        if model.layout(codec=cache.layout.codec, block_tokens=cache.layout.block_tokens) != cache.layout:
            raise ValueError(f"the cache is laid out for {cache.layout.description}, not for {model.name}")
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def forward(self, segments: SequenceOf[Segment]) -> Step:
        """Computes one step and advances the length of its sequences.

        Args:
            segments: at least one, of different sequences; those of one token and longer ones may be mixed.

        Raises:
            ValueError: a segment is empty, does not fit its sequence's blocks or the model's context, or has a token
                outside of the vocabulary. Nothing was computed.
            InternalError: a defect; the KV of the step's sequences is lost.
        """
        self._check(segments)
        batch = Batch(segments, self.cache)
        rows = self._compute(batch, torch.cat((batch.last, *batch.every.values())))
        logits, *every = torch.split(rows, [len(segments), *map(len, batch.every.values())])
        failed: dict[int, ZipserveError] = dict(batch.refused())
        # The maximum is NaN or infinite if anything harmful is in a row; a single -inf is a token that is ruled out.
        for index, good in enumerate(logits.amax(-1).isfinite().tolist()):
            if not good:
                failed.setdefault(index, InternalError("the logits are not finite"))
        for index, segment in enumerate(segments):
            if index in failed:
                logits[index] = 0
            else:
                segment.sequence.length += len(segment.token_ids)
        return Step(logits, dict(zip(batch.every, every, strict=True)), failed)

    def logits_of(self, segment: Segment) -> torch.Tensor:
        """Computes one segment like `forward`; returns the logits after each of its tokens, float32 [tokens, vocab].

        Raises:
            ValueError, InternalError, KvValueError: see `forward`.
        """
        step = self.forward([replace(segment, every_row=True)])
        for error in step.failed.values():
            raise error
        return step.every[0]

    def _compute(self, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        with attending(batch):
            logits = self.model.logits(batch.token_ids, batch.positions, rows)
        if batch.calls != self.cache.layout.layers:
            raise InternalError(f"{batch.calls} layers attended through the engine, not {self.cache.layout.layers}")
        batch.seal()
        return logits

    def _check(self, segments: SequenceOf[Segment]) -> None:
        sequences = [segment.sequence for segment in segments]
        if not segments or len({id(sequence) for sequence in sequences}) != len(segments):
            raise ValueError(f"a step needs at least one segment, each of its own sequence; got {len(segments)}")
        if len({sequence.slot for sequence in sequences}) != len(segments):
            raise ValueError(f"two sequences share a slot: {[sequence.slot for sequence in sequences]}")
        for index, segment in enumerate(segments):
            problem = self._problem(segment)
            if problem:
                raise ValueError(f"segment {index}: {problem}")

    def _problem(self, segment: Segment) -> str | None:
        sequence, ids = segment.sequence, segment.token_ids
        end = sequence.length + len(ids)
        blocks = end // self.cache.layout.block_tokens
        problem = None
        if not ids:
            problem = "has no tokens"
        elif end > self.model.context_tokens:
            problem = f"ends at token {end}, the model's context is {self.model.context_tokens}"
        elif blocks > len(sequence.blocks):
            problem = f"fills {blocks} blocks, its sequence has {len(sequence.blocks)}"
        elif not 0 <= sequence.slot < self.cache.slots:
            problem = f"has slot {sequence.slot} of {self.cache.slots}"
        elif not all(0 <= slab < self.cache.blocks for slab in sequence.blocks[:blocks]):
            problem = f"has slabs outside of the {self.cache.blocks} of the arena"
        elif blocks and self.cache.layout.has_sinks and not 0 <= sequence.sinks < self.cache.sinks:
            problem = f"fills block 0 and has sinks slab {sequence.sinks} of {self.cache.sinks}"
        elif min(ids) < 0 or max(ids) >= self.model.vocab_tokens:
            problem = f"has a token outside of the vocabulary of {self.model.vocab_tokens}"
        return problem
