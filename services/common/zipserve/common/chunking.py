"""How the tokens of a step are shared out among prompts that are computed in chunks. Pure."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar


class Chunked(Protocol):
    """A prompt of which a part may be computed already. Two are the same only if they are the same object."""

    @property
    def priority(self) -> int:
        """Higher goes first."""

    @property
    def number(self) -> int:
        """Number of its arrival: lower goes first within a priority."""

    @property
    def left(self) -> int:
        """Tokens that are still to be computed; at least 1."""


C = TypeVar("C", bound=Chunked)


def rank(prompt: Chunked) -> tuple[int, int]:
    """Sorts by priority, then by arrival."""
    return -prompt.priority, prompt.number


def share(prompts: Iterable[C], step_tokens: int, may_take: Callable[[C], bool] = lambda _: True) -> dict[C, int]:
    """Who computes how many tokens in the next step.

    The first in rank is offered half of the step, so that it advances in every one; then come those of its priority
    that have less left, the shortest first, so that a short prompt does not wait for a long one; what they leave goes
    to the first again, and then to the others by rank.

    Args:
        step_tokens: of all together, at most.
        may_take: asked before a prompt gets its first tokens of the step; False passes it over. It may find that
            less of the prompt is left.

    Returns:
        Tokens by prompt, only those that get any.
    """
    order = sorted(prompts, key=rank)
    if not order:
        return {}
    head, others = order[0], order[1:]
    shorter = [other for other in others if other.priority == head.priority and other.left < head.left]
    shorter.sort(key=lambda prompt: (prompt.left, prompt.number))
    shares: dict[C, int] = {}
    free = step_tokens
    half = -(-step_tokens // 2)
    for prompt, offer in ((head, half), *((p, free) for p in shorter), (head, free), *((p, free) for p in others)):
        if not offer or not free or not (prompt in shares or may_take(prompt)):
            continue
        taken = shares.get(prompt, 0)
        tokens = min(offer, free, prompt.left - taken)
        if tokens:
            shares[prompt] = taken + tokens
            free -= tokens
    return shares
