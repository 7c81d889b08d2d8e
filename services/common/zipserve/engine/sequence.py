"""What the engine knows of a sequence: where its KV lies and how long it is. Pure."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass


@dataclass(eq=False)
class Sequence:
    """KV of one sequence in a KvCache. Two sequences are the same only if they are the same object.

    Whoever makes it owns the slabs and the slot, reserves them and gives them back.
    """

    blocks: list[int]
    """Slabs of the block arena, in the order of positions. The first `length // block_tokens` hold sealed blocks; the
    others are reserved for blocks that will become full."""
    slot: int
    """Open block that holds the newest `length % block_tokens` tokens."""
    length: int = 0
    """Tokens whose KV is here. The engine advances it."""
    sinks: int = -1
    """Slab of the sinks arena, beside block 0; -1 where the codec has none, or while there is no block."""

    def sink_slabs(self, first: int, last: int) -> list[int]:
        """For blocks first .. last - 1 the slab of their sinks: -1 for all but block 0."""
        return [self.sinks if block == 0 else -1 for block in range(first, last)]


@dataclass(frozen=True)
class Segment:
    """Tokens of one sequence that a step computes: one of a decode step, or a chunk of a prompt."""

    sequence: Sequence
    token_ids: SequenceOf[int]
    """They stand at positions sequence.length and following."""
    every_row: bool = False
    """Whether the logits after each of the tokens are wanted, and not only those after the last."""
