"""A sequence that is being continued, as worker and servicer share it."""

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from zipserve.common.errors import ZipserveError
from zipserve.common.kv.layout import SlabKind
from zipserve.common.kv.prefix import PrefixChain
from zipserve.common.transfer.puller import PullStats
from zipserve.decode.scheduler import Ticket
from zipserve.engine.parking import ParkedKv
from zipserve.engine.sampling import Drawn, Sampler
from zipserve.engine.sequence import Segment, Sequence
from zipserve.v1.kv_pb2 import BlockRef
from zipserve.v1.sampling_pb2 import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Continuation:
    """What to generate after the pulled KV, or after a prompt."""

    request_id: str
    token_id: int
    """Newest token of the sequence, whose KV is computed here; of no meaning if there is a prompt."""
    sampling: Sampler
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    priority: int = 0
    prompt: tuple[int, ...] = ()
    """The whole sequence so far, if it is to be computed here and not pulled."""
    chain: PrefixChain | None = None
    """Names of the blocks of the tokens before the newest one, or of the prompt; None: none is found by others."""


class Filling(NamedTuple):
    """A block that will be full after a step."""

    slabs: list[tuple[SlabKind, int]]
    """The sinks first, if it has any."""
    generations: list[int]
    block: int
    name: bytes


@dataclass(frozen=True)
class Computed:
    """What computing a prompt here took."""

    cached_tokens: int
    queue_s: float
    compute_s: float
    prompt_logprobs: list[TokenLogprobs]
    """Of its tokens but the first, if they were asked for."""


@dataclass(frozen=True)
class Finish:
    """Why a stream ended."""

    reason: FinishReason.ValueType


Output = asyncio.Queue[tuple[int, Computed | Drawn | Finish | ZipserveError]]
"""Index of a stream, and its next token or what ended it; never more than max_new_tokens + 2 entries of each."""


@dataclass(eq=False)
class Stream:
    """From its arrival to its last token."""

    continuation: Continuation
    first_position: int
    """Position of the first token that is generated here."""
    next_input: int
    ticket: "Ticket[Stream]" = field(init=False)
    sequence: Sequence = field(init=False)
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    joined_s: float = 0.0
    """When it came into the batch."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens computed so far."""
    pulled: PullStats = field(default_factory=lambda: PullStats(0, 0, 0.0, 0.0))
    queue_s: float = 0.0
    cached_tokens: int = 0
    """Of its prompt, those that were not computed because their KV was here."""
    filling: list[Filling] = field(default_factory=list)
    """Of the step that runs."""
    sealed: list[tuple[int, bytes, tuple[BlockRef, ...]]] = field(default_factory=list)
    """Number, name and slabs of those that it has filled since."""
    parked: ParkedKv | None = None
    """Its KV, from the moment it had to make room until it is back in the cache."""
    parkings: int = 0
    """How often it had to make room."""
    generated: int = 0
    gone: bool = False
    """Finished, failed or abandoned; freed as soon as the device does not use it."""
    index: int = 0
    """Among the streams of its request."""
    output: Output = field(default_factory=asyncio.Queue)
    """Shared by the streams of a request."""

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self.continuation.priority

    @property
    def number(self) -> int:
        """Of its arrival."""
        return self.ticket.number

    @property
    def left(self) -> int:
        """Tokens of its prompt that are still to be computed here."""
        return max(0, len(self.continuation.prompt) - self.sequence.length)

    def next_tokens(self, count: int) -> Segment:
        """The next `count` tokens of its prompt; the newest token when there are none left."""
        start, prompt = self.sequence.length, self.continuation.prompt
        if not self.left:
            return Segment(self.sequence, [self.next_input])
        wants_logprobs = self.continuation.sampling.params.prompt_logprobs is not None
        return Segment(self.sequence, prompt[start : start + count], wants_logprobs)

    def place(self) -> None:
        """Tells the sequence where it lies now."""
        self.sequence.slot = self.ticket.slot
        self.sequence.sinks = next(iter(self.ticket.slabs.sinks), -1)
