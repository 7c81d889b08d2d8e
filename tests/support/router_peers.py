"""Prefill and decode workers as the router sees them: real gRPC, real heartbeats, tokens by rule, faults by script.

The token at a position is the same whoever makes it (`token_at`), so that a test can tell a lost or repeated one.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from inprocess import running
from router_model import CONTEXT_TOKENS, EOS
from zipserve.common.metrics import Metrics
from zipserve.common.models import ModelFiles
from zipserve.common.rpc import Context
from zipserve.common.rpc.duration import to_duration
from zipserve.common.settings import ServiceSettings
from zipserve.v1.decode_service_pb2 import (
    Computed,
    DecodedTokens,
    DecodeFinished,
    DecodeRequest,
    DecodeResponse,
    EndSequenceRequest,
    EndSequenceResponse,
    Pulled,
)
from zipserve.v1.decode_service_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.prefill_service_pb2 import (
    FirstToken,
    PrefillRequest,
    PrefillResponse,
    ReleaseHandleRequest,
    ReleaseHandleResponse,
)
from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceServicer, add_PrefillServiceServicer_to_server
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams, TokenLogprobs
from zipserve.v1.worker_service_pb2 import Capabilities, Load, WorkerRole

VOCAB_TOKENS = 259
# the byte tokenizer's ids of ASCII follow each other from "!" on, after three specials
_FIRST_LETTER = 3 + ord("a") - ord("!")


def token_at(position: int) -> int:
    """A letter, in turn."""
    return _FIRST_LETTER + position % 26


def text_at(position: int, count: int) -> str:
    """Text of the tokens from a position on."""
    return "".join(chr(ord("a") + p % 26) for p in range(position, position + count))


def logprobs_at(position: int, top: int) -> TokenLogprobs:
    """Of the token at a position."""
    return TokenLogprobs(logprob=-position, top_token_ids=range(top), top_logprobs=[-position - i for i in range(top)])


async def nothing(_: object) -> None:
    """The script of a worker that works."""


@dataclass
class Peer:
    """One fake worker; a `zipserve.common.rpc.server.Service`."""

    name: str
    model: ModelFiles
    role: WorkerRole.ValueType
    before: Callable[[object], Awaitable[None]] = nothing
    """Awaited at the start of every call; raises to fail it."""
    at_token: Callable[[object], Awaitable[None]] = nothing
    """Awaited with the position before every decoded token; raises to fail there."""
    by_seed: bool = False
    """Tokens differ by seed: for requests of several choices."""
    end_at: int = 1 << 30
    """Position at which the model ends a sequence."""
    metrics: Metrics = field(default_factory=Metrics)
    requests: list[PrefillRequest | DecodeRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    timeouts_s: list[float] = field(default_factory=list)
    issued: set[bytes] = field(default_factory=set)
    released: list[bytes] = field(default_factory=list)
    ended: list[EndSequenceRequest] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """A call ended before its time."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """A handle was released."""
    layout: bytes = b"layout A"
    draining: bool = False
    tokens_per_event: int = 1
    cached_tokens: int = 0
    """That it says to have found of every prompt."""
    context_tokens: int = CONTEXT_TOKENS
    queued_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    position: int = 0
    """Of the last token decoded, in any call."""
    address: str = ""
    server: grpc.aio.Server | None = None
    death: asyncio.Task[None] | None = None
    incarnation: int = field(default_factory=lambda: secrets.randbits(64))

    async def start(self, address: str) -> None:
        self.address = address

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        self.server = server
        if self.role == WorkerRole.WORKER_ROLE_PREFILL:
            add_PrefillServiceServicer_to_server(_Prefill(self), server)
            return ["zipserve.v1.PrefillService"]
        add_DecodeServiceServicer_to_server(_Decode(self), server)
        return ["zipserve.v1.DecodeService"]

    def entrance(self) -> None:
        return None

    def capabilities(self) -> Capabilities:
        writes = self.role == WorkerRole.WORKER_ROLE_PREFILL
        return Capabilities(
            worker_id=self.name,
            incarnation=self.incarnation,
            role=self.role,
            address=self.address,
            model=self.model.name,
            model_revision=self.model.revision,
            context_tokens=self.context_tokens,
            vocab_tokens=VOCAB_TOKENS,
            eos_token_ids=[EOS],
            readable_layouts=[self.layout],
            writable_layout=self.layout if writes else b"",
            layout_description="a fake layout",
            block_tokens=128,
        )

    def load(self) -> Load:
        return Load(
            draining=self.draining,
            free_blocks=10,
            total_blocks=10,
            queued_tokens=self.queued_tokens,
            prefill_tokens_per_second=self.prefill_tokens_per_s,
        )

    def begin_drain(self) -> None:
        self.draining = True

    async def drained(self) -> None:
        pass

    def loops(self) -> list[asyncio.Task[None]]:
        return []

    async def close(self) -> None:
        pass

    def token(self, position: int, seed: int) -> int:
        """What the model says."""
        shifted = position + seed if self.by_seed else position
        return EOS if shifted == self.end_at else token_at(shifted)

    async def die(self) -> None:
        """Breaks every connection and accepts none; the heartbeat goes on, which is the worst case for a router."""
        assert self.server is not None
        # in a task of its own: a call that does this is itself cancelled by it
        self.death = asyncio.create_task(self.server.stop(None))
        await asyncio.shield(self.death)

    def note(self, request: PrefillRequest | DecodeRequest, context: Context) -> None:
        self.requests.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        self.timeouts_s.append(context.time_remaining())


def _logprobs(sampling: SamplingParams, start: int, count: int) -> list[TokenLogprobs]:
    asked = sampling.HasField("logprobs")
    return [logprobs_at(position, sampling.logprobs) for position in range(start, start + count) if asked]


def _prompt_logprobs(sampling: SamplingParams, tokens: int) -> list[TokenLogprobs]:
    asked = sampling.HasField("prompt_logprobs")
    return [logprobs_at(position, sampling.prompt_logprobs) for position in range(1, tokens) if asked]


class _Prefill(PrefillServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def Prefill(self, request: PrefillRequest, context: Context) -> PrefillResponse:
        peer = self._peer
        peer.note(request, context)
        try:
            await peer.before(request)
        except asyncio.CancelledError:
            peer.cancelled.set()
            raise
        position = len(request.token_ids)
        handle = KvHandle(claims=f"{peer.name} {len(peer.issued)} {position}".encode(), mac=b"signed")
        peer.issued.add(handle.claims)
        return PrefillResponse(
            token_id=peer.token(position, request.sampling.seed),
            other_choices=[
                FirstToken(
                    token_id=peer.token(position, request.sampling.seed + i),
                    logprobs=next(iter(_logprobs(request.sampling, position, 1)), None),
                )
                for i in range(1, request.choices)
            ],
            handle=handle,
            cached_tokens=peer.cached_tokens,
            queue_time=to_duration(0.25),
            compute_time=to_duration(0.5),
            logprobs=next(iter(_logprobs(request.sampling, position, 1)), None),
            prompt_logprobs=_prompt_logprobs(request.sampling, position),
        )

    async def ReleaseHandle(self, request: ReleaseHandleRequest, context: Context) -> ReleaseHandleResponse:
        self._peer.released.append(request.handle.claims)
        self._peer.changed.set()
        return ReleaseHandleResponse()


class _Decode(DecodeServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def Decode(self, request: DecodeRequest, context: Context) -> AsyncIterator[DecodeResponse]:
        peer = self._peer
        peer.note(request, context)
        complete = False
        try:
            await peer.before(request)
            if request.prompt_token_ids:
                start = len(request.prompt_token_ids)
                told = _prompt_logprobs(request.sampling, start)
                queue_time, compute_time = to_duration(0.25), to_duration(0.5)
                yield DecodeResponse(
                    computed=Computed(queue_time=queue_time, compute_time=compute_time, prompt_logprobs=told)
                )
            else:
                pulled = Pulled(bytes=4096, blocks=1, transfer_time=to_duration(0.125), verify_time=to_duration(0.125))
                yield DecodeResponse(pulled=pulled)
                start = int(request.handle.claims.split()[-1]) + 1
            seeds = [request.sampling.seed, *(sibling.seed for sibling in request.siblings)]
            running = set(range(len(seeds)))
            for first in range(start, start + request.max_new_tokens, peer.tokens_per_event):
                last = min(first + peer.tokens_per_event, start + request.max_new_tokens)
                await peer.at_token(first)
                peer.position = last - 1
                for number in sorted(running):
                    token_ids = [peer.token(p, seeds[number]) for p in range(first, last)]
                    logprobs = _logprobs(request.sampling, first, len(token_ids))
                    tokens = DecodedTokens(position=first, token_ids=token_ids, logprobs=logprobs, sequence=number)
                    yield DecodeResponse(tokens=tokens)
                    if set(token_ids) & set(request.stop_token_ids):
                        running.remove(number)
                        reason = FinishReason.FINISH_REASON_STOP
                        yield DecodeResponse(finished=DecodeFinished(reason=reason, sequence=number))
                if not running:
                    break
            for number in sorted(running):
                reason = FinishReason.FINISH_REASON_LENGTH
                yield DecodeResponse(finished=DecodeFinished(reason=reason, sequence=number))
            complete = True
        finally:
            if not complete:
                peer.cancelled.set()

    async def EndSequence(self, request: EndSequenceRequest, context: Context) -> EndSequenceResponse:
        """Is noted only: tokens that are on their way come all the same."""
        self._peer.ended.append(request)
        return EndSequenceResponse()


@asynccontextmanager
async def serving(peer: Peer, settings: ServiceSettings) -> AsyncIterator[Peer]:
    """Runs a fake worker, registered, until the context ends."""
    own = settings.model_copy(update={"worker_id": peer.name, "listen": "127.0.0.1:0", "drain_s": 1.0})
    async with running(peer, own):
        yield peer
