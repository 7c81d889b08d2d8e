"""InferenceService on gRPC: messages to domain and back; decides nothing."""

import re
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog

from zipserve.common import tracing
from zipserve.common.rpc import Context
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_duration
from zipserve.router.frontend import Event, Finished, Frontend, Started
from zipserve.v1 import inference_service_pb2 as pb
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceServicer

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class InferenceServicer(InferenceServiceServicer):
    """The public face of zipserve."""

    def __init__(self, frontend: Frontend, deadline_default_s: float) -> None:
        self._frontend = frontend
        self._deadline_default_s = deadline_default_s

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        request_id = _request_id(context)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        deadline = Deadline.of(context, self._deadline_default_s)
        async with aclosing(self._frontend.generate(request, request_id, deadline)) as events:
            async for event in events:
                yield _response(event)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        model, facts = self._frontend.model, self._frontend.facts()
        return pb.ListModelsResponse(
            models=[pb.Model(id=model.name, revision=model.revision, context_tokens=facts.context_tokens)]
        )


def _request_id(context: Context, draw: Callable[[], uuid.UUID] = uuid.uuid4) -> str:
    """The client's id where it is a printable word of at most 128 characters, else a new one."""
    given = next((value for key, value in context.invocation_metadata() or () if key == tracing.REQUEST_ID_KEY), "")
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else draw().hex


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
