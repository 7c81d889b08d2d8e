"""DecodeService: protos to domain and back."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from zipserve.common.errors import InvalidRequestError, ZipserveError
from zipserve.common.rpc import Context
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_duration
from zipserve.common.sampling import Sampling
from zipserve.decode.stream import Computed, Continuation, Finish, Stream
from zipserve.decode.worker import DecodeWorker
from zipserve.engine.device import Device
from zipserve.engine.sampling import Drawn, Sampler
from zipserve.v1 import decode_service_pb2, decode_service_pb2_grpc


class DecodeServicer(decode_service_pb2_grpc.DecodeServiceServicer):
    """What the router calls."""

    def __init__(self, worker: DecodeWorker, device: Device, deadline_default_s: float) -> None:
        self._worker = worker
        self._device = device
        self._deadline_default_s = deadline_default_s

    async def Decode(
        self, request: decode_service_pb2.DecodeRequest, context: Context
    ) -> AsyncGenerator[decode_service_pb2.DecodeResponse, None]:
        deadline = Deadline.of(context, self._deadline_default_s)
        continuation = self._continuation(request)
        if continuation.prompt:
            async with (
                self._worker.computed(continuation, deadline) as stream,
                aclosing(_told(stream, deadline)) as events,
            ):
                async for event in events:
                    yield event
        else:
            async with self._worker.pulled(request.handle, continuation, deadline) as stream:
                yield decode_service_pb2.DecodeResponse(pulled=_pulled(stream))
                async with aclosing(_told(stream, deadline)) as events:
                    async for event in events:
                        yield event

    def _continuation(self, request: decode_service_pb2.DecodeRequest) -> Continuation:
        if request.max_new_tokens < 1:
            raise InvalidRequestError("max_new_tokens is 0, must be at least 1", field="max_new_tokens")
        if request.HasField("handle") == bool(request.prompt_token_ids):
            raise InvalidRequestError("needs either a handle or prompt_token_ids", field="handle")
        past = request.prompt_token_ids or [*request.past_token_ids, request.token_id]
        for field, token_id in (
            ("token_id", request.token_id),
            ("prompt_token_ids", max(request.prompt_token_ids, default=0)),
            ("past_token_ids", max(request.past_token_ids, default=0)),
        ):
            if token_id >= self._device.vocab_tokens:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {self._device.vocab_tokens}", field=field
                )
        params = Sampling.from_proto(request.sampling)
        params.check_ids(self._device.vocab_tokens)
        return Continuation(
            request_id=request.request_id,
            token_id=request.token_id,
            sampling=Sampler(
                params,
                past,
                prompt_tokens=request.prompt_tokens,
                min_tokens=request.min_tokens,
                stop_token_ids=request.stop_token_ids,
            ),
            max_new_tokens=request.max_new_tokens,
            stop_token_ids=frozenset(request.stop_token_ids),
            priority=request.priority,
            prompt=tuple(request.prompt_token_ids),
        )


async def _told(stream: Stream, deadline: Deadline) -> AsyncGenerator[decode_service_pb2.DecodeResponse, None]:
    """What comes out of a stream, tokens that are there together in one event."""
    position = stream.first_position
    while True:
        async with asyncio.timeout(deadline.remaining_s()):
            item = await stream.output.get()
        if isinstance(item, Computed):
            yield decode_service_pb2.DecodeResponse(computed=_computed(item))
            continue
        tokens: list[Drawn] = []
        while isinstance(item, Drawn):
            tokens.append(item)
            if stream.output.empty():
                break
            item = stream.output.get_nowait()
        if tokens:
            yield decode_service_pb2.DecodeResponse(tokens=_decoded(position, tokens))
            position += len(tokens)
        if isinstance(item, ZipserveError):
            raise item
        if isinstance(item, Finish):
            yield decode_service_pb2.DecodeResponse(finished=decode_service_pb2.DecodeFinished(reason=item.reason))
            return


def _computed(item: Computed) -> decode_service_pb2.Computed:
    return decode_service_pb2.Computed(
        queue_time=to_duration(item.queue_s),
        compute_time=to_duration(item.compute_s),
        prompt_logprobs=item.prompt_logprobs,
    )


def _decoded(position: int, tokens: list[Drawn]) -> decode_service_pb2.DecodedTokens:
    return decode_service_pb2.DecodedTokens(
        position=position,
        token_ids=[drawn.token_id for drawn in tokens],
        logprobs=[drawn.logprobs for drawn in tokens if drawn.logprobs is not None],
    )


def _pulled(stream: Stream) -> decode_service_pb2.Pulled:
    return decode_service_pb2.Pulled(
        bytes=stream.pulled.size_bytes,
        blocks=stream.pulled.blocks,
        transfer_time=to_duration(stream.pulled.transfer_s),
        verify_time=to_duration(stream.pulled.verify_s),
        queue_time=to_duration(stream.queue_s),
    )
