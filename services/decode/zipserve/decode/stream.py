"""A sequence that is being continued, as worker and servicer share it."""

import asyncio
from dataclasses import dataclass, field

from zipserve.common.errors import ZipserveError
from zipserve.common.transfer.puller import PullStats
from zipserve.decode.scheduler import Ticket
from zipserve.engine.parking import ParkedKv
from zipserve.engine.sampling import Drawn, Sampler
from zipserve.engine.sequence import Sequence
from zipserve.v1.sampling_pb2 import FinishReason


@dataclass(frozen=True)
class Continuation:
    """What to generate after the pulled KV."""

    request_id: str
    token_id: int
    """Newest token of the sequence, whose KV is computed here."""
    sampling: Sampler
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    priority: int = 0


@dataclass(frozen=True)
class Finish:
    """Why a stream ended."""

    reason: FinishReason.ValueType


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
    pulled: PullStats = field(default_factory=lambda: PullStats(0, 0, 0.0, 0.0))
    queue_s: float = 0.0
    parked: ParkedKv | None = None
    """Its KV, from the moment it had to make room until it is back in the cache."""
    generated: int = 0
    gone: bool = False
    """Finished, failed or abandoned; freed as soon as the device does not use it."""
    output: "asyncio.Queue[Drawn | Finish | ZipserveError]" = field(default_factory=asyncio.Queue)
    """Tokens, then what ended the stream; never more than max_new_tokens + 1 entries."""

    def place(self) -> None:
        """Tells the sequence where it lies now."""
        self.sequence.slot = self.ticket.slot
        self.sequence.sinks = next(iter(self.ticket.slabs.sinks), -1)
