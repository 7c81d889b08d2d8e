"""A prompt on its way through the worker, and what becomes of it."""

import asyncio
from dataclasses import dataclass, field

from zipserve.engine.sampling import Drawn, Sampler
from zipserve.engine.sequence import Sequence
from zipserve.v1.kv_pb2 import BlockRef, KvHandle
from zipserve.v1.sampling_pb2 import TokenLogprobs


@dataclass(frozen=True)
class Prefilled:
    """A computed prompt."""

    drawn: list[Drawn]
    """The token after it, of each choice."""
    prompt_logprobs: list[TokenLogprobs]
    """Of its tokens but the first, if they were asked for."""
    handle: KvHandle
    cached_tokens: int
    """Of the prompt, those that were not computed because their KV was there."""
    queue_s: float
    compute_s: float


@dataclass
class Prompt:
    """What is to be computed, and the future that its caller awaits."""

    request_id: str
    token_ids: list[int]
    samplers: list[Sampler]
    """Of each choice."""
    names: list[bytes]
    """Chained hashes of its blocks, and of the tail if there is one."""
    submitted_s: float
    result: "asyncio.Future[Prefilled]"
    started_s: float = 0.0
    """When its first step began; 0: it waits."""
    steps: int = 0
    """That it took part in."""
    seal_s: tuple[float, float] = (0.0, 0.0)
    """When the slabs of the last of them were begun and done to be sealed."""
    sequence: Sequence | None = None
    """From then on."""
    sealed: list[tuple[BlockRef, ...]] = field(default_factory=list)
    """Of its full blocks so far: each one's slab, and before that of block 0 the sinks."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens computed so far but the first, and of the next one, if they are asked for."""
