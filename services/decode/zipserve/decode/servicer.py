"""DecodeService: protos to domain and back."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

from zipserve.common import tracing
from zipserve.common.errors import InvalidRequestError, ZipserveError
from zipserve.common.guide import Guide
from zipserve.common.kv.prefix import PrefixChain, chain_salt
from zipserve.common.rpc import Context
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_duration
from zipserve.common.sampling import CHOICES_MAX, Sampling
from zipserve.decode.observation import observed
from zipserve.decode.stream import Computed, Continuation, Finish, Stream
from zipserve.decode.worker import DecodeWorker
from zipserve.engine.device import Device
from zipserve.engine.sampling import Drawn, Sampler
from zipserve.v1 import decode_service_pb2, decode_service_pb2_grpc

_EVENT_ITEMS_MAX = 512
"""So that a router whose client has paused for long gets its tokens in messages of bounded size."""


class DecodeServicer(decode_service_pb2_grpc.DecodeServiceServicer):
    """What the router calls."""

    def __init__(self, worker: DecodeWorker, device: Device, deadline_default_s: float) -> None:
        self._worker = worker
        self._device = device
        self._deadline_default_s = deadline_default_s
        self._streams: dict[bytes, list[Stream]] = {}
        """Of the calls that have a stream_id."""

    async def Decode(
        self, request: decode_service_pb2.DecodeRequest, context: Context
    ) -> AsyncGenerator[decode_service_pb2.DecodeResponse, None]:
        deadline = Deadline.of(context, self._deadline_default_s)
        continuations = await self._continuations(request)
        with observed(request.request_id) as seen:
            if request.prompt_token_ids:
                async with self._worker.computed(continuations[0], deadline) as stream:
                    seen.append(stream)
                    async with aclosing(_told([stream], deadline)) as events:
                        async for event in events:
                            yield event
            else:
                async with self._worker.pulled(request.handle, continuations, deadline) as streams:
                    seen.extend(streams)
                    with self._named(request.stream_id, streams):
                        yield decode_service_pb2.DecodeResponse(pulled=_pulled(streams[0]))
                        async with aclosing(_told(streams, deadline)) as events:
                            async for event in events:
                                yield event

    async def EndSequence(
        self, request: decode_service_pb2.EndSequenceRequest, context: Context
    ) -> decode_service_pb2.EndSequenceResponse:
        for stream in self._streams.get(request.stream_id, []):
            if stream.index == request.sequence:
                self._worker.stop(stream)
        return decode_service_pb2.EndSequenceResponse()

    @contextmanager
    def _named(self, stream_id: bytes, streams: list[Stream]) -> Iterator[None]:
        """Streams that `EndSequence` finds while the context is open."""
        if not stream_id:
            yield
            return
        if stream_id in self._streams:
            raise InvalidRequestError(f"stream_id {stream_id.hex()[:32]} is in use", field="stream_id")
        self._streams[stream_id] = streams
        try:
            yield
        finally:
            del self._streams[stream_id]

    async def _continuations(self, request: decode_service_pb2.DecodeRequest) -> list[Continuation]:
        self._check(request)
        params = Sampling.from_proto(request.sampling)
        params.check_ids(self._device.vocab_tokens)
        newest = [(request.token_id, params.seed), *((sibling.token_id, sibling.seed) for sibling in request.siblings)]
        chain = self._chain(request)
        sequences = [request.prompt_token_ids or [*request.past_token_ids, token_id] for token_id, _ in newest]
        matchers = await self._device.matchers(Guide.of(request), sequences, request.prompt_tokens)
        return [
            Continuation(
                request_id=request.request_id,
                token_id=token_id,
                sampling=Sampler(
                    replace(params, seed=seed),
                    token_ids,
                    prompt_tokens=request.prompt_tokens,
                    min_tokens=request.min_tokens,
                    stop_token_ids=request.stop_token_ids,
                    guide=matcher,
                ),
                max_new_tokens=request.max_new_tokens,
                stop_token_ids=frozenset(request.stop_token_ids),
                priority=request.priority,
                prompt=tuple(request.prompt_token_ids),
                chain=chain and chain.copy(),
            )
            for (token_id, seed), token_ids, matcher in zip(newest, sequences, matchers, strict=True)
        ]

    def _chain(self, request: decode_service_pb2.DecodeRequest) -> PrefixChain | None:
        """Names of the blocks before the newest token; None where nothing is to be shared."""
        token_ids, layout = request.prompt_token_ids or request.past_token_ids, self._device.layout
        if not token_ids or self._worker.shares_nothing:
            return None
        chain = PrefixChain(layout.block_tokens, chain_salt(layout.fingerprint, request.cache_salt))
        chain.extend(token_ids)
        return chain

    def _check(self, request: decode_service_pb2.DecodeRequest) -> None:
        if request.max_new_tokens < 1:
            raise InvalidRequestError("max_new_tokens is 0, must be at least 1", field="max_new_tokens")
        if request.HasField("handle") == bool(request.prompt_token_ids):
            raise InvalidRequestError("needs either a handle or prompt_token_ids", field="handle")
        most = 0 if request.prompt_token_ids else CHOICES_MAX - 1
        if len(request.siblings) > most:
            raise InvalidRequestError(
                f"there are {len(request.siblings)} siblings, at most {most} are allowed", field="siblings"
            )
        for field, token_id in (
            ("token_id", request.token_id),
            ("prompt_token_ids", max(request.prompt_token_ids, default=0)),
            ("past_token_ids", max(request.past_token_ids, default=0)),
            ("siblings", max((sibling.token_id for sibling in request.siblings), default=0)),
        ):
            if token_id >= self._device.vocab_tokens:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {self._device.vocab_tokens}", field=field
                )


async def _told(streams: list[Stream], deadline: Deadline) -> AsyncGenerator[decode_service_pb2.DecodeResponse, None]:
    """What comes out of the streams of a request, as a span of its own."""
    with tracing.lasting("decode") as span:
        async with aclosing(_events(streams, deadline)) as events:
            async for event in events:
                if event.HasField("computed"):
                    tracing.record("compute", streams[0].joined_s, time.monotonic(), span)
                elif event.HasField("tokens") and event.tokens.position == streams[0].first_position:
                    span.add_event("first_token")
                yield event


async def _events(streams: list[Stream], deadline: Deadline) -> AsyncGenerator[decode_service_pb2.DecodeResponse, None]:
    """Tokens of a stream that are there together come in one event."""
    output, running = streams[0].output, len(streams)
    positions = [stream.first_position for stream in streams]
    while running:
        async with asyncio.timeout(deadline.remaining_s()):
            items = [await output.get()]
        while not output.empty() and len(items) < _EVENT_ITEMS_MAX:
            items.append(output.get_nowait())
        drawn: dict[int, list[Drawn]] = {}
        for index, item in items:
            if isinstance(item, Computed):
                yield decode_service_pb2.DecodeResponse(computed=_computed(item))
            elif isinstance(item, Drawn):
                drawn.setdefault(index, []).append(item)
        for index, tokens in drawn.items():
            yield decode_service_pb2.DecodeResponse(tokens=_decoded(index, positions[index], tokens))
            positions[index] += len(tokens)
        for index, item in items:
            if isinstance(item, ZipserveError):
                raise item
            if isinstance(item, Finish):
                running -= 1
                finished = decode_service_pb2.DecodeFinished(reason=item.reason, sequence=index)
                yield decode_service_pb2.DecodeResponse(finished=finished)


def _computed(item: Computed) -> decode_service_pb2.Computed:
    return decode_service_pb2.Computed(
        cached_tokens=item.cached_tokens,
        queue_time=to_duration(item.queue_s),
        compute_time=to_duration(item.compute_s),
        prompt_logprobs=item.prompt_logprobs,
    )


def _decoded(index: int, position: int, tokens: list[Drawn]) -> decode_service_pb2.DecodedTokens:
    return decode_service_pb2.DecodedTokens(
        sequence=index,
        position=position,
        token_ids=[drawn.token_id for drawn in tokens],
        logprobs=[drawn.logprobs for drawn in tokens if drawn.logprobs is not None],
        complete=tokens[-1].complete,
    )


def _pulled(stream: Stream) -> decode_service_pb2.Pulled:
    return decode_service_pb2.Pulled(
        bytes=stream.pulled.size_bytes,
        blocks=stream.pulled.blocks,
        transfer_time=to_duration(stream.pulled.transfer_s),
        verify_time=to_duration(stream.pulled.verify_s),
        queue_time=to_duration(stream.queue_s),
    )
