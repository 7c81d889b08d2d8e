"""What a request takes besides its steps: pulling its KV, and the way through the router. Measured one at a time."""

import asyncio
import statistics
import time
from contextlib import suppress
from itertools import cycle
from random import Random

import numpy as np

from zipserve.common.errors import ZipserveError
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.rpc.status import client_errors
from zipserve.planner.native.nonnegative import solve_robust
from zipserve.planner.native.profile import Link
from zipserve.planner.profiling.cluster import Cluster, Watched
from zipserve.planner.profiling.drive import GREEDY, prefilled, request_id
from zipserve.v1.decode_service_pb2 import DecodeRequest
from zipserve.v1.decode_service_pb2_grpc import DecodeServiceStub
from zipserve.v1.inference_service_pb2 import GenerateRequest, TokenIds
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import StopConditions

_TIMEOUT_S = 60.0
_LENGTHS = (60, 130, 300, 600, 1200, 2000)
_PULLS_MIN = 8
_REQUESTS = 20
_PROMPT_TOKENS = 16
_BYTES_PER_S_MAX = 1e12
"""Where pulls take the same time whatever they move."""


async def link_of(cluster: Cluster, prefill: Watched, decode: Watched, seconds: float, tokens_max: int) -> Link:
    """Pulls KV of prompts of several lengths for a time, at least a few times, and fits a line."""
    random = Random(0)  # noqa: S311  these are lengths
    pulls: list[tuple[float, float]] = []
    until_s = time.monotonic() + seconds
    longest = min(prefill.limits(tokens_max).tokens_max, decode.limits(tokens_max).tokens_max)
    for tokens in cycle(sorted({min(tokens, longest) for tokens in _LENGTHS})):
        if time.monotonic() > until_s and len(pulls) >= _PULLS_MIN:
            break
        ids = [random.randrange(prefill.record.capabilities.vocab_tokens) for _ in range(tokens)]
        pulls.append(await _pull(cluster.channels, prefill, decode, ids))
    return line(pulls)


def line(pulls: list[tuple[float, float]]) -> Link:
    """The link through pulls of (bytes, ms)."""
    sizes, ms = np.array(pulls).T
    A = np.column_stack((np.ones(len(sizes)), sizes))
    fixed_ms, byte_ms = solve_robust(A, ms)
    return Link(min(_BYTES_PER_S_MAX, 1e3 / max(byte_ms, 1e-12)), float(fixed_ms))


async def _pull(channels: ChannelPool, prefill: Watched, decode: Watched, token_ids: list[int]) -> tuple[float, float]:
    """Hands one prompt over; bytes, and ms from the call to the verified KV, less the wait in the queue."""
    answer = await prefilled(channels, prefill, token_ids)
    request = DecodeRequest(
        request_id=request_id(),
        handle=answer.handle,
        token_id=answer.token_id,
        prompt_tokens=len(token_ids),
        sampling=GREEDY,
        max_new_tokens=1,
    )
    begun_s = time.monotonic()
    size, took_s = 0, 0.0
    with client_errors():
        async for event in DecodeServiceStub(channels.get(decode.address)).Decode(request, timeout=_TIMEOUT_S):
            if event.HasField("pulled"):
                took_s = time.monotonic() - begun_s - to_seconds(event.pulled.queue_time)
                size = event.pulled.bytes
    return float(size), 1e3 * max(took_s, 1e-6)


async def overhead_ms_of(router: str, vocab_tokens: int, api_key: str = "") -> float:
    """Median time to the first token of a short prompt through the router, less queue and steps.

    Raises:
        ZipserveError: the router does not serve us.
    """
    random = Random(1)  # noqa: S311  these are lengths
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    found = []
    async with ChannelPool(4 << 20) as channels:
        stub = InferenceServiceStub(channels.get(router))
        for _ in range(_REQUESTS):
            ids = TokenIds(ids=[random.randrange(vocab_tokens) for _ in range(_PROMPT_TOKENS)])
            request = GenerateRequest(
                token_ids=ids, sampling=GREEDY, stop=StopConditions(max_tokens=2, ignore_eos=True)
            )
            begun_s = time.monotonic()
            first_s, worked_s = 0.0, 0.0
            with client_errors():
                async for event in stub.Generate(request, timeout=_TIMEOUT_S, metadata=metadata):
                    if event.HasField("delta") and not first_s:
                        first_s = time.monotonic() - begun_s
                    if event.HasField("finished"):
                        timings = event.finished.timings
                        worked_s = to_seconds(timings.queue) + to_seconds(timings.prefill)
            found.append(1e3 * max(0.0, first_s - worked_s))
    return statistics.median(found)


async def try_overhead_ms(cluster: Cluster, api_key: str) -> float | None:
    """The same of a cluster; None where there is no router, or it does not serve us."""
    if not cluster.router:
        return None
    with suppress(ZipserveError, TimeoutError):
        async with asyncio.timeout(_TIMEOUT_S):
            return await overhead_ms_of(cluster.router, cluster.workers[0].record.capabilities.vocab_tokens, api_key)
    return None
