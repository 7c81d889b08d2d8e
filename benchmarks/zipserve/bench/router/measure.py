"""Loads for a router before stub workers, and what they show."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from zipserve.bench.router.rig import Rig, Usage
from zipserve.bench.serve import arrivals as schedule
from zipserve.bench.serve.arrivals import Arrival
from zipserve.bench.serve.drive import drive, warm_up
from zipserve.bench.serve.endpoints import Ask, GrpcEndpoint, Prompt
from zipserve.bench.serve.records import Record, quantile
from zipserve.client import AsyncClient
from zipserve.common.errors import InternalError
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.decode_service_pb2 import DecodeRequest
from zipserve.v1.decode_service_pb2_grpc import DecodeServiceStub
from zipserve.v1.inference_service_pb2 import GenerateRequest, GenerateResponse, TokenIds
from zipserve.v1.prefill_service_pb2 import PrefillRequest
from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceStub
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions

_GENERATE = "/zipserve.v1.InferenceService/Generate"
_TIMEOUT_S = 300.0
_PROMPT = [100] * 16
_WARM_UP = 50

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rate: float = 50.0
    """Requests per second of the open loop."""
    requests: int = 1_000
    prompt_words: int = 128
    answer_tokens: int = 16
    streams: int = 64
    """At the same time, where tokens per second are counted."""
    stream_tokens: int = 1_000
    lives: int = 20_000
    """Requests over which memory is watched."""
    lives_before: int = 2_000
    """Those of them after which it is looked at first."""


QUICK = Size(requests=50, streams=8, stream_tokens=200, lives=200, lives_before=100)


@dataclass(frozen=True)
class Latency:
    """Time to the first token in seconds: through the router, and of the same arrivals without it."""

    p50_s: float
    p99_s: float
    direct_p50_s: float
    direct_p99_s: float
    lag_p99_s: float
    """By how much the client itself was late."""
    cpu_s: float
    """Of the router, for one request."""


async def latency(rig: Rig, size: Size) -> Latency:
    """Two open loops, one after the other: of text prompts through the router, and of calls of the stubs themselves.

    Raises:
        InternalError: a request failed.
    """
    randomness = random.Random(1)  # noqa: S311  the same load in every run
    at = schedule.times("poisson", size.rate, randomness)
    due = [Arrival(next(at), size.prompt_words, size.answer_tokens) for _ in range(size.requests)]
    prompts: list[Prompt] = [" ".join(f"word{randomness.randrange(1000)}" for _ in range(a.prompt_tokens)) for a in due]
    async with ChannelPool.within(rig.settings) as channels:
        prefill, decode = await rig.stubs()
        direct = await _open_loop(Direct(channels, prefill, decode).ask, due, [_PROMPT] * len(due))
    async with AsyncClient(rig.address) as client:
        before_s = rig.router.cpu_s()
        through = await _open_loop(GrpcEndpoint(client, _TIMEOUT_S).ask, due, prompts)
        cpu_s = rig.router.cpu_s() - before_s
    firsts, direct_firsts = ([record.ttft_s for record in records] for records in (through, direct))
    return Latency(
        p50_s=quantile(firsts, 0.5),
        p99_s=quantile(firsts, 0.99),
        direct_p50_s=quantile(direct_firsts, 0.5),
        direct_p99_s=quantile(direct_firsts, 0.99),
        lag_p99_s=quantile([record.lag_s for record in through], 0.99),
        cpu_s=cpu_s / (len(due) + _WARM_UP),
    )


async def _open_loop(ask: Ask, due: list[Arrival], prompts: list[Prompt]) -> list[Record]:
    await warm_up(ask, due[:_WARM_UP], prompts[:_WARM_UP])
    records = await drive(ask, due, prompts)
    failed = [
        (record.error, record.tokens)
        for record, arrival in zip(records, due, strict=True)
        if record.error or record.tokens != arrival.output_tokens
    ]
    if failed:
        raise InternalError(
            f"{len(failed)} of {len(records)} requests failed; error and tokens of the first: {failed[0]}"
        )
    return records


class Direct:
    """The stubs without a router before them, called as it would call them."""

    def __init__(self, channels: ChannelPool, prefill: str, decode: str) -> None:
        """
        Args:
            prefill: the stub's host:port.
            decode: the other one's.
        """
        self._prefill = PrefillServiceStub(channels.get(prefill))
        self._decode = DecodeServiceStub(channels.get(decode))

    async def ask(self, prompt: Prompt, output_tokens: int, record: Record) -> None:
        """See `Ask`; the prompt is one of token ids."""
        assert not isinstance(prompt, str)
        record.sent_s = time.perf_counter()
        answer = await self._prefill.Prefill(PrefillRequest(token_ids=prompt), timeout=_TIMEOUT_S)
        record.arrivals.append((time.perf_counter(), 1))
        request = DecodeRequest(handle=answer.handle, token_id=answer.token_id, max_new_tokens=output_tokens - 1)
        async for event in self._decode.Decode(request, timeout=_TIMEOUT_S):
            if event.HasField("tokens"):
                record.arrivals.append((time.perf_counter(), len(event.tokens.token_ids)))
        record.ended_s = time.perf_counter()


@dataclass(frozen=True)
class Throughput:
    """Of many streams at the same time."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    """For each second that the router computed: what it could do if nothing else held it back."""
    messages_per_token: float


async def throughput(rig: Rig, size: Size) -> Throughput:
    """Streams of tokens over gRPC, all at once. Answers are read when the clock has stopped.

    Raises:
        InternalError: a stream lacks tokens.
    """
    request = GenerateRequest(
        token_ids=TokenIds(ids=_PROMPT),
        sampling=SamplingParams(temperature=0.0),
        stop=StopConditions(max_tokens=size.stream_tokens, ignore_eos=True),
    ).SerializeToString()
    async with grpc.aio.insecure_channel(rig.address) as channel:
        generate: Any = channel.unary_stream(_GENERATE)

        async def stream() -> list[bytes]:
            return [response async for response in generate(request, timeout=_TIMEOUT_S)]

        answers, seconds, cpu_s = await _timed(stream, rig.router, size)
    for answer in answers:
        _check(answer, size.stream_tokens)
    return _throughput(size, seconds, cpu_s, sum(len(answer) for answer in answers))


async def http(rig: Rig, size: Size) -> Throughput:
    """The same over HTTP, as server-sent events, each stream on a connection of its own.

    Raises:
        InternalError: a stream lacks tokens.
    """
    body = json.dumps({
        "prompt": _PROMPT, "max_tokens": size.stream_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {rig.http_address}\r\ncontent-type: application/json\r\n"
    request = f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    host, _, port = rig.http_address.rpartition(":")

    async def stream() -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        answer = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        return answer

    answers, seconds, cpu_s = await _timed(stream, rig.router, size)
    for answer in answers:
        if f'"completion_tokens":{size.stream_tokens}'.encode() not in answer or b"data: [DONE]" not in answer:
            raise InternalError(f"a stream over HTTP ends with {answer[-300:]!r}")
    return _throughput(size, seconds, cpu_s, sum(answer.count(b"data: ") for answer in answers))


async def _timed(
    stream: Callable[[], Coroutine[Any, Any, T]], router: Usage, size: Size
) -> tuple[list[T], float, float]:
    """Answers, seconds, and seconds that the router computed."""
    await stream()
    before_s, started_s = router.cpu_s(), time.perf_counter()
    answers = await asyncio.gather(*(stream() for _ in range(size.streams)))
    return answers, time.perf_counter() - started_s, router.cpu_s() - before_s


def _throughput(size: Size, seconds: float, cpu_s: float, messages: int) -> Throughput:
    tokens = size.streams * size.stream_tokens
    return Throughput(tokens / seconds, tokens / max(cpu_s, 0.01), messages / tokens)


def _check(answer: list[bytes], tokens: int) -> None:
    seen = 0
    for data in answer:
        response = GenerateResponse.FromString(data)
        if response.HasField("delta"):
            if response.delta.index != seen:
                raise InternalError(f"a stream has token {response.delta.index} where {seen} was due")
            seen += len(response.delta.token_ids)
    if seen != tokens:
        raise InternalError(f"a stream has {seen} tokens, not {tokens}")


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the router."""

    before: int
    after: int

    @property
    def growth(self) -> float:
        """As a share of what there was before."""
        return self.after / self.before - 1


async def memory(rig: Rig, size: Size) -> Memory:
    """Short requests, as many at a time as there were streams."""
    async with AsyncClient(rig.address) as client:

        async def live(count: int) -> None:
            for _ in range(count):
                async for _ in client.generate("Once upon a time", max_tokens=4, ignore_eos=True):
                    pass

        async def lives(count: int) -> None:
            async with asyncio.TaskGroup() as running:
                for i in range(size.streams):
                    running.create_task(live(len(range(i, count, size.streams))))

        await lives(size.lives_before)
        before = rig.router.memory_bytes()
        await lives(size.lives - size.lives_before)
        return Memory(before, rig.router.memory_bytes())
