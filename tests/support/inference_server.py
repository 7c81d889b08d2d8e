"""A router of a test's own making: answers by script, in a thread, and keeps what it was asked."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_status import rpc_status

from zipserve.common.errors import ZipserveError
from zipserve.common.rpc.status import to_status
from zipserve.v1 import inference_service_pb2 as pb
from zipserve.v1.inference_service_pb2 import (
    Delta,
    Finished,
    GenerateRequest,
    GenerateResponse,
    KvTransfer,
    Model,
    Started,
    Timings,
    Usage,
)
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from zipserve.v1.sampling_pb2 import FinishReason

STARTED = GenerateResponse(started=Started(request_id="r-1", model="m", prompt_tokens=5, seed=7))
FINISHED = GenerateResponse(
    finished=Finished(
        reason=FinishReason.FINISH_REASON_STOP,
        usage=Usage(prompt_tokens=5, completion_tokens=3),
        timings=Timings(prefill=Duration(nanos=20_000_000), transfer=Duration(nanos=1_500_000)),
        kv_transfer=KvTransfer(bytes=3 << 20, blocks=2, tokens=300),
    )
)


def delta(index: int, token_ids: Sequence[int], text: str) -> GenerateResponse:
    return GenerateResponse(delta=Delta(index=index, token_ids=token_ids, text=text))


WHOLE = [STARTED, delta(0, [1], "Par"), delta(1, [2, 3], "is."), FINISHED]
Script = Callable[[GenerateRequest, Any], Iterator[GenerateResponse]]


class FakeInference(InferenceServiceServicer):
    """Answers as the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.script: Script
        self.answer(WHOLE)
        self.requests: list[GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        """Of every call."""
        self.timeouts_s: list[float | None] = []
        self.asked: list[Any] = []
        """Requests other than those to stream."""
        self.failures: list[ZipserveError] = []
        """Raised by the next calls, one each."""
        self.cancelled = threading.Event()

    def Generate(self, request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
        self.requests.append(request)
        self._note(context)
        yield from self.script(request, context)

    def GenerateUnary(self, request: pb.GenerateUnaryRequest, context: Any) -> pb.GenerateUnaryResponse:
        self._keep(request, context)
        return pb.GenerateUnaryResponse(choices=[pb.Completion(text="Paris.")])

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._keep(request, context)
        return pb.TokenizeResponse(token_ids=[1, 2, 3], context_tokens=10)

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        self._keep(request, context)
        return pb.DetokenizeResponse(text="Paris.")

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._keep(request, context)
        return pb.ListModelsResponse(models=[Model(id="m", context_tokens=10, vocab_tokens=100)])

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self._keep(request, context)
        return pb.GetModelResponse(model=Model(id="m", context_tokens=10, vocab_tokens=100))

    def _keep(self, request: Any, context: Any) -> None:
        self.asked.append(request)
        self._note(context)

    def _note(self, context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self.timeouts_s.append(context.time_remaining())
        if self.failures:
            context.abort_with_status(rpc_status.to_status(to_status(self.failures.pop(0))))

    def answer(self, responses: Sequence[GenerateResponse]) -> None:
        self.script = lambda _request, _context: iter(responses)

    def fail(self, error: ZipserveError, first: Sequence[GenerateResponse] = ()) -> None:
        def script(request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
            yield from first
            context.abort_with_status(rpc_status.to_status(to_status(error)))

        self.script = script

    def hang(self, *first: GenerateResponse) -> None:
        def script(request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
            if not context.add_callback(self.cancelled.set):
                self.cancelled.set()
            yield from first
            self.cancelled.wait(10)

        self.script = script


@contextmanager
def serving(fake: FakeInference, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Serves until the context ends; gives host:port."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_InferenceServiceServicer_to_server(fake, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
