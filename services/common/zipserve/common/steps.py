"""What a worker tells of its forward passes, one by one: what was in each, and how long it took. Pure.

From these the planner learns how fast a worker is; a histogram cannot say what a slow step had to do.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice

STEPS_MAX = 1 << 13


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass."""

    prompt_tokens: int
    """Of prompts, computed in it."""
    pairs: int
    """Of a prompt's token with a token that it attends to: the sum of `pairs_of` its chunks."""
    rows: int
    """Sequences that decoded."""
    context_tokens: int
    """Tokens that these attended to, each its newest one included."""
    seconds: float
    """Of the whole turn of the loop: from the step's begin to when the next one could begin."""


def pairs_of(before: int, tokens: int) -> int:
    """Pairs of a token with one that it attends to, itself included, in a chunk of `tokens` after `before` others."""
    return tokens * before + tokens * (tokens + 1) // 2


class StepLog:
    """The last steps of a worker, numbered from 1. One thread notes and reads."""

    def __init__(self, steps_max: int = STEPS_MAX) -> None:
        self._steps: deque[Step] = deque(maxlen=steps_max)
        self.last = 0
        """Number of the newest step; 0: there was none yet."""

    def note(self, step: Step) -> None:
        """Keeps a step, in the place of the oldest one if there are too many."""
        self._steps.append(step)
        self.last += 1

    def after(self, number: int, steps_max: int) -> tuple[list[Step], int, int]:
        """The oldest steps that are younger than step `number`.

        Returns:
            At most `steps_max` steps in order, the number of the last one, or `number` where there is none, and how
            many before them are not kept any more.
        """
        oldest = self.last - len(self._steps)
        lost = max(0, oldest - number)
        begin = number + lost
        steps = list(islice(self._steps, begin - oldest, begin - oldest + steps_max))
        return steps, begin + len(steps), lost
