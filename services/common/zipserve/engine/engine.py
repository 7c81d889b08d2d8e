"""Runs steps: tokens of many sequences through the model, their KV into the cache, the logits back."""

from collections.abc import Sequence as SequenceOf

import torch

from zipserve.common.errors import InternalError
from zipserve.engine.attention import attending
from zipserve.engine.batch import Batch
from zipserve.engine.cache import KvCache
from zipserve.engine.model import LoadedModel
from zipserve.engine.sequence import Segment


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
    def forward(self, segments: SequenceOf[Segment]) -> torch.Tensor:
        """Computes one step and advances the length of its sequences.

        After an error other than ValueError the KV of the step's sequences is lost; that of others is untouched.

        Args:
            segments: at least one, of different sequences; those of one token and longer ones may be mixed.

        Returns:
            [segments, vocab] float32: logits for the token that follows each segment.

        Raises:
            ValueError: a segment is empty, does not fit its sequence's blocks or the model's context, or has a token
                outside of the vocabulary. Nothing was computed.
            InternalError: logits are not finite; the message names the segments by index.
        """
        self._check(segments)
        batch = Batch(segments, self.cache)
        with attending(batch):
            logits = self.model.logits(batch.token_ids, batch.positions, batch.last)
        if batch.calls != self.cache.layout.layers:
            raise InternalError(f"{batch.calls} layers attended through the engine, not {self.cache.layout.layers}")
        # The maximum is NaN or infinite if anything harmful is in a row; a single -inf is a token that is ruled out.
        finite = logits.amax(-1).isfinite()
        if not finite.all():
            broken = [index for index, good in enumerate(finite.tolist()) if not good]
            raise InternalError(f"the logits of segments {broken} are not finite")
        for segment in segments:
            segment.sequence.length += len(segment.token_ids)
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
        elif min(ids) < 0 or max(ids) >= self.model.vocab_tokens:
            problem = f"has a token outside of the vocabulary of {self.model.vocab_tokens}"
        return problem
