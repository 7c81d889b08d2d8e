"""InferenceService on gRPC: messages to domain and back; decides nothing but what fits into a message."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog

from zipserve.common import tracing
from zipserve.common.errors import InvalidRequestError
from zipserve.common.rpc import Context
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_duration
from zipserve.router.access.keyring import KeyRing
from zipserve.router.caller import Caller
from zipserve.router.frontend import Event, Finished, Frontend, Started
from zipserve.router.request_id import request_id
from zipserve.v1 import inference_service_pb2 as pb
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceServicer

_TOO_MUCH = "the answer's tokens so far, which Generate would stream,"


class InferenceServicer(InferenceServiceServicer):
    """The public face of zipserve."""

    def __init__(self, frontend: Frontend, keys: KeyRing, message_bytes_max: int) -> None:
        self._frontend = frontend
        self._keys = keys
        self._message_bytes_max = message_bytes_max

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with aclosing(self._events(request, context)) as events:
            async for event in events:
                yield _response(event)

    async def GenerateUnary(self, request: pb.GenerateUnaryRequest, context: Context) -> pb.GenerateUnaryResponse:
        answer = _Answer(self._message_bytes_max)
        async with aclosing(self._events(request.request, context)) as events:
            async for event in events:
                answer.add(event)
        return answer.response()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        token_ids = await self._frontend.tokenize(request, self._deadline(context), self._caller(context))
        response = pb.TokenizeResponse(token_ids=token_ids, context_tokens=self._frontend.facts().context_tokens)
        _check_size(response.ByteSize(), self._message_bytes_max, f"the answer's {len(token_ids)} ids", "prompt")
        return response

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        text = await self._frontend.detokenize(
            request.model, request.token_ids, self._deadline(context), self._caller(context)
        )
        response = pb.DetokenizeResponse(text=text)
        _check_size(response.ByteSize(), self._message_bytes_max, f"the answer's {len(text)} characters", "token_ids")
        return response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self._frontend.served()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._frontend.served(request.model))

    def _events(self, request: pb.GenerateRequest, context: Context) -> AsyncGenerator[Event, None]:
        own_id = _request_id(context)
        structlog.contextvars.bind_contextvars(request_id=own_id)
        return self._frontend.generate(request, own_id, self._deadline(context), self._caller(context))

    def _caller(self, context: Context) -> Caller:
        return self._keys.caller(context.invocation_metadata() or ())

    def _deadline(self, context: Context) -> Deadline:
        return self._frontend.deadline(context.time_remaining())


class _Answer:
    """Gathers the events of a request, as long as they fit into one message."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._whole = pb.GenerateUnaryResponse()
        self._texts: dict[int, list[str]] = {}
        self._choices: dict[int, pb.Completion] = {}

    def add(self, event: Event) -> None:
        """Takes in an event.

        Raises:
            InvalidRequestError: the answer has become too large; more of it need not be generated.
        """
        part = _response(event)
        if part.HasField("delta"):
            delta = part.delta
            self._count(pb.Completion(text=delta.text, token_ids=delta.token_ids, logprobs=delta.logprobs).ByteSize())
            choice = self._choice(delta.choice)
            choice.token_ids.extend(delta.token_ids)
            choice.logprobs.extend(delta.logprobs)
            self._texts[delta.choice].append(delta.text)
        elif part.HasField("finished"):
            self._choice(part.finished.choice).finished.CopyFrom(part.finished)
        else:
            self._count(part.ByteSize())
            if part.HasField("started"):
                self._whole.started.CopyFrom(part.started)
            self._whole.prompt_logprobs.extend(part.prompt_logprobs.logprobs)

    def response(self) -> pb.GenerateUnaryResponse:
        """The whole."""
        for index, choice in sorted(self._choices.items()):
            choice.text = "".join(self._texts[index])
            self._whole.choices.append(choice)
        _check_size(self._whole.ByteSize(), self._bytes_max, _TOO_MUCH, "request")
        return self._whole

    def _choice(self, index: int) -> pb.Completion:
        self._texts.setdefault(index, [])
        return self._choices.setdefault(index, pb.Completion())

    def _count(self, size: int) -> None:
        self._bytes += size
        _check_size(self._bytes, self._bytes_max, _TOO_MUCH, "request")


def _check_size(size: int, bytes_max: int, what: str, field: str) -> None:
    if size > bytes_max:
        raise InvalidRequestError(f"{what} make {size} bytes, a message has at most {bytes_max}", field=field)


def _request_id(context: Context) -> str:
    return request_id(dict(context.invocation_metadata() or ()).get(tracing.REQUEST_ID_KEY))


def _response(event: Event) -> pb.GenerateResponse:
    if isinstance(event, Started):
        started = pb.Started(
            request_id=event.job.request_id,
            model=event.model,
            prompt_tokens=len(event.job.prompt),
            seed=event.job.sampling.seed,
        )
        return pb.GenerateResponse(started=started)
    if isinstance(event, Finished):
        return pb.GenerateResponse(finished=_finished(event))
    if isinstance(event, pb.PromptLogprobs):
        return pb.GenerateResponse(prompt_logprobs=event)
    delta = pb.Delta(
        index=event.index, token_ids=event.token_ids, text=event.text, logprobs=event.logprobs, choice=event.choice
    )
    return pb.GenerateResponse(delta=delta)


def _finished(event: Finished) -> pb.Finished:
    report = event.report
    return pb.Finished(
        reason=event.reason,
        choice=event.choice,
        stop_string=event.stop_string,
        usage=pb.Usage(
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            replays=report.replays,
            cached_prompt_tokens=report.cached_tokens,
        ),
        timings=pb.Timings(
            queue=to_duration(report.queue_s),
            prefill=to_duration(report.prefill_s),
            transfer=to_duration(report.transfer_s),
            first_token=to_duration(event.first_token_s),
            decode=to_duration(event.decode_s),
        ),
        kv_transfer=pb.KvTransfer(bytes=report.kv_bytes, blocks=report.kv_blocks, tokens=report.kv_tokens),
    )
