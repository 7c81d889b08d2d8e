"""The load-time probe: does the model give the same logits through the engine as through plain transformers?

A family that expresses something where we do not look (its own attention code, its mask, state besides KV) would serve
wrong text without any error. So a model serves only after a few random sequences have given, in mixed steps of prompt
chunks and decode rows over a small cache, the logits that the unhooked module gives for each of them alone. One of them
is also asked for at the end of the context, where some families scale what they do not scale at its begin.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from zipserve.common.errors import InvalidRequestError
from zipserve.engine.attention import IMPLEMENTATION, Attender, Scoring, Visibility, attending
from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.fused import FusedModel
from zipserve.engine.model import LoadedModel
from zipserve.engine.sequence import Segment, Sequence
from zipserve.kernels.prefill_attention import prefill_attention

BLOCK_TOKENS = 16
STEPS = ((21, 6, 0), (1, 28, 22), (1, 1, 1))
"""For each step the tokens of each sequence. They begin late, cross blocks from inside of one, decode beside a chunk,
and decode at neighbouring positions, which masks made for packed rows confuse."""
WINDOW_TOKENS = 8
"""Wider windows are narrowed to this while the probe runs: what is checked is how a window is expressed."""
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")

TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Greatest norm of the logits' error by norm of the logits around their mean. Mistakes are of the order of 1."""
TOLERANCE_MAX = 0.5
"""Where transformers' own two attentions differ (half precision, routed experts), twice that is allowed, up to this."""


@dataclass(frozen=True)
class References:
    """What plain transformers computes for some random sequences."""

    ids: list[list[int]]
    logits: list[torch.Tensor]
    """Of each sequence, float32 [tokens, vocab]."""
    late: torch.Tensor
    """Of the first sequence at the last positions of the context, likewise."""
    noise: float
    """The greatest error between the two attentions that transformers has; 0 where the family has one only."""


def probe(model: LoadedModel, references: References | None = None) -> None:
    """Compares the engine with plain transformers.

    Args:
        references: taken before the model's weights were packed; None: they still are as they were.

    Raises:
        InvalidRequestError: the logits differ, or the context is too short to tell.
    """
    if references is None:
        references = take_references(model)
    with _narrow_windows(model):
        found = _through_engine(model, references.ids)
        late = _late(model, references.ids[0])
    errors = [(_error(logits, references.logits[at[0]][at[1] - 1]), at) for at, logits in found.items()]
    for position, got, wanted in zip(_late_positions(model, len(late)), late, references.late, strict=True):
        errors.append((_error(got, wanted), (0, position + 1)))
    error, (sequence, end) = max(errors)
    tolerance = TOLERANCE[model.dtype]
    if error > tolerance:
        tolerance = min(tolerance + 2 * references.noise, TOLERANCE_MAX)
    if error > tolerance:
        raise InvalidRequestError(
            f"model {model.name} gives other logits through the engine than through transformers: they differ by "
            f"{error:.2g} of their spread at token {end} of sequence {sequence} (tolerance {tolerance:.2g}); "
            f"its family does something that zipserve does not know",
            field="model",
        )


def take_references(model: LoadedModel) -> References:
    """Asks plain transformers, over the module's own weights.

    Raises:
        InvalidRequestError: the context is too short to tell.
    """
    lengths = [sum(tokens) for tokens in zip(*STEPS, strict=True)]
    if model.context_tokens < max(lengths):
        raise InvalidRequestError(
            f"model {model.name} has a context of {model.context_tokens} tokens, zipserve needs {max(lengths)}"
        )
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(model.vocab_tokens, (length,), generator=generator).tolist() for length in lengths]
    with _narrow_windows(model):
        wanted = _through_transformers(model, ids, "eager")  # every family has it
        late = _through_transformers(model, ids[:1], "eager", _late_positions(model, lengths[0]))
        return References(ids, wanted, late[0], _noise(model, ids, wanted))


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = float((found - wanted).norm() / (wanted - wanted.mean()).norm())
    return math.inf if math.isnan(error) else error


def _noise(model: LoadedModel, ids: list[list[int]], wanted: list[torch.Tensor]) -> float:
    try:
        others = _through_transformers(model, ids, "sdpa")
    except ValueError:
        return 0.0
    return max(_error(*rows) for pair in zip(others, wanted, strict=True) for rows in zip(*pair, strict=True))


def _through_engine(model: LoadedModel, ids: list[list[int]]) -> dict[tuple[int, int], torch.Tensor]:
    """Logits by (sequence, tokens so far)."""
    layout = model.layout(block_tokens=BLOCK_TOKENS)
    blocks = [layout.blocks_for(len(tokens)) for tokens in ids]
    cache = KvCache(layout, sum(blocks), 0, len(ids), device=model.device)
    free = iter(range(sum(blocks)))
    sequences = [Sequence([next(free) for _ in range(count)], slot) for slot, count in enumerate(blocks)]
    engine = Engine(model, cache)
    found = {}
    for step in STEPS:
        running = [index for index, tokens in enumerate(step) if tokens]
        starts = [sequences[index].length for index in running]
        segments = [
            Segment(sequences[index], ids[index][start : start + step[index]])
            for index, start in zip(running, starts, strict=True)
        ]
        computed = engine.forward(segments)
        for error in computed.failed.values():
            raise error
        for index, logits in zip(running, computed.logits, strict=True):
            found[index, sequences[index].length] = logits
    return found


class _Alone(Attender):
    """Answers attention over a row that is one sequence, wherever its positions are."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See zipserve.engine.attention.Attender."""
        first = torch.tensor([scoring.visibility.first(row) for row in range(query.shape[1])], device=query.device)
        output, _ = prefill_attention(
            query, key, value, 0, scale=scoring.scale, first=first, softcap=scoring.softcap, sink_logits=scoring.sinks
        )
        return output.to(query.dtype)


def _late_positions(model: LoadedModel, tokens: int) -> range:
    return range(model.context_tokens - tokens, model.context_tokens)


@torch.inference_mode()
def _late(model: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of a sequence at the last positions of the context."""
    positions = torch.tensor([_late_positions(model, len(ids))], device=model.device)
    with attending(_Alone()):
        return model.logits(torch.tensor([ids], device=model.device), positions, positions[0] - positions[0, 0])


@torch.inference_mode()
def _through_transformers(
    model: LoadedModel, ids: list[list[int]], attention: str, positions: range | None = None
) -> list[torch.Tensor]:
    """Logits [tokens, vocab] of each sequence by itself, with an attention of transformers over the same weights.

    Args:
        positions: of the tokens of each; None: from 0 on.
    """
    model.module.set_attn_implementation(attention)
    at = {} if positions is None else {"position_ids": torch.tensor([positions], device=model.device)}
    try:
        rows = (torch.tensor([tokens], device=model.device) for tokens in ids)
        return [model.module(input_ids=row, use_cache=False, **at).logits[0].float() for row in rows]
    finally:
        model.module.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def _narrow_windows(model: LoadedModel) -> Iterator[None]:
    """Windows and chunks wider than the probe's sequences would never be seen to work."""
    changed = []
    plan = model.forward if isinstance(model.forward, FusedModel) else None
    scorings = plan.scorings if plan else ()
    try:
        for holder in (model.module.config.get_text_config(), *model.module.modules()):
            for field in _WINDOW_FIELDS:
                width = getattr(holder, field, None)
                if isinstance(width, int) and width > WINDOW_TOKENS:
                    changed.append((holder, field, width))
                    setattr(holder, field, WINDOW_TOKENS)
        if plan:
            plan.scorings = tuple(map(_narrowed, scorings))
        yield
    finally:
        for holder, field, width in changed:
            setattr(holder, field, width)
        if plan:
            plan.scorings = scorings


def _narrowed(scoring: Scoring) -> Scoring:
    seen = scoring.visibility
    widths = (None if width is None else min(width, WINDOW_TOKENS) for width in (seen.window, seen.chunk))
    return replace(scoring, visibility=Visibility(*widths))
