"""A client for tests: streams tokens, checks the order of events, and counts nothing twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zipserve.v1 import inference_service_pb2 as pb
from zipserve.v1 import sampling_pb2

if TYPE_CHECKING:
    from zipserve.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub as Stub
else:  # the stub for asyncio exists for type checkers only
    from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub as Stub

__all__ = ["Streamed", "Stub", "collect", "request"]


@dataclass
class Streamed:
    """What came out of one stream."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    started: pb.Started = field(default_factory=pb.Started)
    finished: pb.Finished = field(default_factory=pb.Finished)


def request(
    token_ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, seed: int = 7, ignore_eos: bool = True
) -> pb.GenerateRequest:
    """A request for token ids."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=token_ids),
        sampling=sampling_pb2.SamplingParams(temperature=temperature, seed=seed),
        stop=sampling_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=ignore_eos),
    )


async def collect(
    stub: Stub,
    message: pb.GenerateRequest,
    timeout_s: float = 120.0,
    on_tokens: Callable[[int], None] | None = None,
) -> Streamed:
    """Reads a stream to its end.

    Args:
        on_tokens: called with the number of tokens so far, after every delta.

    Raises:
        grpc.aio.AioRpcError: the stream failed.
        AssertionError: events came out of order, or an index was skipped or repeated.
    """
    result = Streamed()
    events = []
    async for response in stub.Generate(message, timeout=timeout_s):
        event = response.WhichOneof("event")
        events.append(event)
        if event == "started":
            result.started = response.started
        elif event == "delta":
            if response.delta.token_ids:
                assert response.delta.index == len(result.token_ids), "a token was lost or repeated"
            result.token_ids += response.delta.token_ids
            result.text += response.delta.text
            if on_tokens is not None:
                on_tokens(len(result.token_ids))
        else:
            result.finished = response.finished
    assert (events[0], events[-1]) == ("started", "finished"), events
    assert events.count("started") == events.count("finished") == 1
    assert result.finished.usage.completion_tokens == len(result.token_ids)
    return result
