"""What workers are made to compute, so that their steps tell what each part of one costs. Pure.

A round goes once through all settings, in another order and with other lengths each time; rounds follow one another as
long as there is time, so that a slow minute of the machine falls on all settings alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

_LENGTHS = (4, 12, 32, 64, 110, 180, 300, 600, 1200, 2400, 4800, 9600)
_BATCHES = (1, 3, 8)
_BATCH_TOKENS_MAX = 600
"""Of prompts that come together; longer ones come one by one."""
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_CONTEXT_BLOCKS = (0, 1, 3, 8, 16, 32, 64)
_CONTEXT_TOKENS_MAX = 6_000
"""Of all sequences that decode together: computing their prompts takes time."""
ROOM_TOKENS = 128
"""Beyond its context, for what a sequence decodes until all have their tokens."""
_SHARE = 0.6
"""Of a worker's slabs that are used at most; others may be at work there."""


@dataclass(frozen=True)
class Limits:
    """What a worker bears."""

    slots: int
    blocks: int
    tails: int
    block_tokens: int
    tokens_max: int
    """Longest sequence, and longest one that is to be measured."""

    def fits(self, lengths: list[int]) -> bool:
        """Whether sequences of so many tokens can be there at once."""
        blocks = sum(-(-tokens // self.block_tokens) for tokens in lengths)
        return (
            max(lengths) <= self.tokens_max
            and len(lengths) <= min(self.slots, self.tails)
            and (blocks <= _SHARE * self.blocks or len(lengths) == 1)
            and blocks <= self.blocks
        )


@dataclass(frozen=True)
class Rows:
    """Sequences that decode together."""

    contexts: tuple[int, ...]
    """Tokens of each when it begins: few, or a bit more than whole blocks, which are there from before."""
    beside: tuple[int, ...]
    """Lengths of prompts that are computed meanwhile, one after the other, again and again; empty: none."""


def prompts(limits: Limits, random: Random) -> Iterator[list[int]]:
    """One round of prompts: the lengths of those that come together."""
    sizes = [
        (batch, length)
        for length in _up_to(limits.tokens_max, _LENGTHS)
        for batch in _BATCHES
        if batch * length <= (_BATCH_TOKENS_MAX if batch > 1 else limits.tokens_max)
    ]
    random.shuffle(sizes)
    batches = ([_near(length, limits, random) for _ in range(batch)] for batch, length in sizes)
    return (batch for batch in batches if limits.fits(batch))


def rows(limits: Limits, random: Random) -> Iterator[Rows]:
    """One round of sequences that decode, by themselves and with prompts beside them in turns."""
    sizes = [
        (count, blocks)
        for blocks in _CONTEXT_BLOCKS
        for count in _ROWS
        if count * blocks * limits.block_tokens <= _CONTEXT_TOKENS_MAX
    ]
    random.shuffle(sizes)
    for number, (count, blocks) in enumerate(sizes):
        contexts = tuple(
            min(blocks * limits.block_tokens + random.randint(1, 8), limits.tokens_max) for _ in range(count)
        )
        if limits.fits(list(contexts)):
            yield Rows(contexts, _beside(limits, random) if number % 2 else ())


def _beside(limits: Limits, random: Random) -> tuple[int, ...]:
    lengths = _up_to(min(limits.tokens_max, _BATCH_TOKENS_MAX), _LENGTHS)
    return tuple(_near(random.choice(lengths), limits, random) for _ in range(8))


def _up_to(most: int, lengths: Sequence[int]) -> list[int]:
    """The shorter ones, and the longest that may be."""
    return [*(length for length in lengths if length < most), most]


def _near(tokens: int, limits: Limits, random: Random) -> int:
    return min(limits.tokens_max, max(1, round(tokens * random.uniform(0.75, 1.25))))
