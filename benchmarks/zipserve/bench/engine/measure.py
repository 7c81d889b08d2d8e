"""Turns: every contestant does the same work once a round, while the others are idle."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zipserve.bench import rows
from zipserve.bench.engine.contestants import Contestant
from zipserve.bench.timing import Timing
from zipserve.common.errors import InternalError
from zipserve.engine.model import LoadedModel
from zipserve.engine.sequence import Segment

SETTLE_S = 0.02
"""After a turn: so long may threads spin that wait for more work."""
TOLERANCE = 1e-3
"""Greatest difference of float32 logits between two orders of summation."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a decode step of `rows` rows of `tokens` tokens, or a prompt of `tokens` tokens."""

    kind: Literal["decode", "prefill"]
    tokens: int
    rows: int = 1

    @property
    def name(self) -> str:
        """Such as `decode 8 × 1024`."""
        return f"decode {self.rows} × {self.tokens}" if self.kind == "decode" else f"prefill {self.tokens}"

    def tokens_s(self, timing: Timing) -> float:
        """New tokens of decode steps, or tokens of prompts, per second."""
        return (self.rows if self.kind == "decode" else self.tokens) / timing.median_s


Results = dict[Cell, dict[str, Timing]]
"""By cell and contestant."""


def decode(contestants: Sequence[Contestant], cell: Cell, rounds: int, steps: int) -> dict[str, Timing]:
    """Of one step; contestants go on with the rows that they hold."""
    for contestant in contestants:
        contestant.hold(cell.rows, cell.tokens)
    # The first step of a turn finds threads asleep and caches full of others' data.
    return turns(contestants, lambda contestant: contestant.steps(steps + 1)[1:], rounds)


def prefill(contestants: Sequence[Contestant], cell: Cell, rounds: int) -> dict[str, Timing]:
    """Of one prompt."""
    return turns(contestants, lambda contestant: [contestant.prefill(cell.tokens)], rounds)


def turns(
    contestants: Iterable[Contestant], turn: Callable[[Contestant], list[float]], rounds: int
) -> dict[str, Timing]:
    """Seconds of all rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds + 1):
        for contestant in contestants:
            time.sleep(SETTLE_S)
            found = turn(contestant)
            if number:
                seconds[contestant.name] += found
    return {name: Timing.of(found) for name, found in seconds.items()}


def difference(model: LoadedModel, reference: Any, tokens: int = 48, steps: int = 3) -> float:
    """Greatest difference of logits between our engine and a Hugging Face module, after a prompt and decode steps.

    No block is sealed meanwhile, so that it holds for every codec.
    """
    ids = rows.prompt(model.vocab_tokens, tokens + steps)
    engine = rows.engine(model, "raw", len(ids), 1)
    sequence, last = rows.compute(engine, ids[:tokens])
    found = [last, *(engine.forward([Segment(sequence, [token])]).logits[0] for token in ids[tokens:])]
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, tokens - 1 :]
    return float((torch.stack(found) - expected).abs().max())


def require_equal(name: str, found: float) -> None:
    """
    Raises:
        InternalError: the logits differ by more than rounding, so that speed means nothing.
    """
    if not found <= TOLERANCE:
        raise InternalError(f"{name}: logits differ from Hugging Face's by {found:.3g}, more than {TOLERANCE:g}")
