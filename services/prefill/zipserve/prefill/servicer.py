"""PrefillService: protos to domain and back."""

from zipserve.common.errors import InvalidRequestError, LayoutMismatchError
from zipserve.common.guide import Guide
from zipserve.common.rpc import Context
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_duration
from zipserve.common.sampling import CHOICES_MAX, Sampling
from zipserve.common.transfer.source import KvSource
from zipserve.engine.device import Device
from zipserve.engine.sampling import Sampler
from zipserve.prefill.worker import PrefillWorker
from zipserve.v1 import prefill_service_pb2, prefill_service_pb2_grpc


class PrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    """What the router calls."""

    def __init__(self, worker: PrefillWorker, source: KvSource, device: Device, deadline_default_s: float) -> None:
        self._worker = worker
        self._source = source
        self._device = device
        self._deadline_default_s = deadline_default_s

    async def Prefill(
        self, request: prefill_service_pb2.PrefillRequest, context: Context
    ) -> prefill_service_pb2.PrefillResponse:
        self._check(request)
        deadline = Deadline.of(context, self._deadline_default_s)
        deadline.remaining_s()
        params = Sampling.from_proto(request.sampling)
        params.check_ids(self._device.vocab_tokens)
        choices = range(request.choices or 1)
        matchers = await self._device.matchers(
            Guide.of(request), [request.token_ids for _ in choices], request.prompt_tokens
        )
        samplers = [
            Sampler(
                params.of_choice(choice),
                request.token_ids,
                prompt_tokens=request.prompt_tokens,
                min_tokens=request.min_tokens,
                stop_token_ids=request.stop_token_ids,
                guide=matcher,
            )
            for choice, matcher in zip(choices, matchers, strict=True)
        ]
        done = await self._worker.prefill(
            request.request_id,
            list(request.token_ids),
            samplers,
            deadline,
            request.priority,
            request.cache_salt,
        )
        return prefill_service_pb2.PrefillResponse(
            token_id=done.drawn[0].token_id,
            handle=done.handle,
            queue_time=to_duration(done.queue_s),
            compute_time=to_duration(done.compute_s),
            logprobs=done.drawn[0].logprobs,
            prompt_logprobs=done.prompt_logprobs,
            other_choices=[
                prefill_service_pb2.FirstToken(
                    token_id=drawn.token_id, logprobs=drawn.logprobs, complete=drawn.complete
                )
                for drawn in done.drawn[1:]
            ],
            cached_tokens=done.cached_tokens,
            complete=done.drawn[0].complete,
        )

    async def ReleaseHandle(
        self, request: prefill_service_pb2.ReleaseHandleRequest, context: Context
    ) -> prefill_service_pb2.ReleaseHandleResponse:
        self._source.release_handle(request.handle)
        return prefill_service_pb2.ReleaseHandleResponse()

    def _check(self, request: prefill_service_pb2.PrefillRequest) -> None:
        count, limit = len(request.token_ids), self._device.context_tokens
        if not 0 < count < limit:
            raise InvalidRequestError(f"the prompt has {count} tokens, must have 1 to {limit - 1}", field="token_ids")
        largest = max(request.token_ids)
        if largest >= self._device.vocab_tokens:
            raise InvalidRequestError(
                f"token id {largest} is outside the vocabulary of {self._device.vocab_tokens}", field="token_ids"
            )
        if request.choices > CHOICES_MAX:
            raise InvalidRequestError(f"choices is {request.choices}, at most {CHOICES_MAX}", field="choices")
        layout = self._device.layout
        if request.layout_fingerprint != layout.fingerprint:
            raise LayoutMismatchError(
                f"asked for layout {request.layout_fingerprint.hex()[:16]}, this worker writes "
                f"{layout.fingerprint.hex()[:16]} ({layout.description})"
            )
