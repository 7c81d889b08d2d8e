"""What a long prompt does to streams that are being decoded: the gaps between their tokens, as a client sees them."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from zipserve.bench import rows
from zipserve.common.errors import InternalError, ZipserveError
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.status import client_errors
from zipserve.v1.inference_service_pb2 import GenerateRequest, TokenIds
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions

if TYPE_CHECKING:  # this name exists in the stubs only
    from zipserve.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

_MESSAGE_BYTES_MAX = 4 << 20


@dataclass(frozen=True)
class Load:
    """What is asked of a stack."""

    vocab_tokens: int
    streams: int = 8
    stream_prompt_tokens: int = 128
    stream_tokens: int = 2500
    """Most tokens of a stream; they are cancelled when all is measured."""
    quiet_tokens: int = 60
    """Tokens of every stream before a long prompt comes."""
    prompt_tokens: int = 4096
    prompts: int = 2
    """Long prompts, one after another."""


@dataclass(frozen=True)
class Gaps:
    """Seconds between tokens, of all streams."""

    quiet_s: list[float]
    """While no prompt was being computed."""
    beside_prompt_s: list[float]
    """Of gaps in which a long prompt waited or was computed."""
    first_token_s: list[float]
    """From each long prompt to its first token."""

    @property
    def median_ratio(self) -> float:
        """Median beside a prompt, as a multiple of the undisturbed one."""
        return statistics.median(self.beside_prompt_s) / statistics.median(self.quiet_s)

    @property
    def p99_ratio(self) -> float:
        """99th percentile beside a prompt, as a multiple of the undisturbed median."""
        return percentile(self.beside_prompt_s, 0.99) / statistics.median(self.quiet_s)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(address: str, load: Load) -> Gaps:
    """Runs the streams and the prompts.

    Raises:
        ZipserveError: a stream failed.
        InternalError: the streams ended before the last prompt was computed.
    """
    return asyncio.run(_measure(address, load))


async def _measure(address: str, load: Load) -> Gaps:
    async with ChannelPool(_MESSAGE_BYTES_MAX) as channels:
        client = _Client(InferenceServiceStub(channels.get(address)), load.vocab_tokens)
        streams = [_Stream() for _ in range(load.streams)]
        async with _running([stream.run(client, load) for stream in streams]):
            spans = []
            for _ in range(load.prompts):
                started = await _grown(streams, 2)  # the first gaps have other streams' prompts in them
                quiet = (started, await _grown(streams, load.quiet_tokens))
                sent = time.perf_counter()
                await client.first_token(load.prompt_tokens)
                spans.append((quiet, (sent, time.perf_counter())))
            await _grown(streams, 1)  # the gaps that were open at the end of the last prompt
    gaps = [gap for stream in streams for gap in pairwise(stream.arrivals_s)]
    quiet_s = [to - since for since, to in gaps for (start, end), _ in spans if start <= since and to <= end]
    beside_s = [to - since for since, to in gaps for _, (start, end) in spans if since < end and to > start]
    return Gaps(quiet_s, beside_s, [end - start for _, (start, end) in spans])


class _Client:
    def __init__(self, stub: "InferenceServiceAsyncStub", vocab_tokens: int) -> None:
        self._stub = stub
        self._vocab_tokens = vocab_tokens
        self._prompts = 0

    async def tokens(self, prompt_tokens: int, new_tokens: int) -> AsyncIterator[None]:
        """One item for each event with tokens, after a prompt that was never seen."""
        self._prompts += 1
        request = GenerateRequest(
            token_ids=TokenIds(ids=rows.prompt(self._vocab_tokens, prompt_tokens, self._prompts)),
            sampling=SamplingParams(temperature=0.0),
            stop=StopConditions(max_tokens=new_tokens, ignore_eos=True),
        )
        with client_errors():
            async for response in self._stub.Generate(request):
                if response.HasField("delta") and response.delta.token_ids:
                    yield None

    async def first_token(self, prompt_tokens: int) -> None:
        """Returns when a prompt has been computed."""
        async for _ in self.tokens(prompt_tokens, 1):
            pass


class _Stream:
    def __init__(self) -> None:
        self.arrivals_s: list[float] = []
        self._wanted = 0
        self._grown = asyncio.Event()

    async def run(self, client: _Client, load: Load) -> None:
        """Takes note of when tokens arrive, until it is cancelled."""
        async for _ in client.tokens(load.stream_prompt_tokens, load.stream_tokens):
            self.arrivals_s.append(time.perf_counter())
            if len(self.arrivals_s) >= self._wanted:
                self._grown.set()
        raise InternalError(f"a stream of {load.stream_tokens} tokens ended before the prompts were computed")

    async def grown(self, tokens: int) -> None:
        """Returns when `tokens` more have arrived."""
        self._wanted = len(self.arrivals_s) + tokens
        self._grown.clear()
        await self._grown.wait()


async def _grown(streams: Sequence[_Stream], tokens: int) -> float:
    """Waits until every stream has `tokens` more; returns the time."""
    await asyncio.gather(*(stream.grown(tokens) for stream in streams))
    return time.perf_counter()


@asynccontextmanager
async def _running(streams: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Runs streams beside the context, and cancels them at its end; the first one that fails ends the context."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(stream) for stream in streams]
            yield
            for task in tasks:
                task.cancel()
    except* ZipserveError as errors:
        raise errors.exceptions[0] from None
