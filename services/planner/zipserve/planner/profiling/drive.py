"""Makes workers compute what the grid asks for, straight by their own RPCs, with random tokens that nobody has in a
cache."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import cycle
from random import Random
from typing import Any

from zipserve.common.errors import DeadlineError, InvalidRequestError, OverloadedError
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.rpc.status import client_errors
from zipserve.planner.profiling import grid
from zipserve.planner.profiling.cluster import Cluster, Watched
from zipserve.planner.profiling.grid import Limits, Rows
from zipserve.v1.decode_service_pb2 import DecodeRequest
from zipserve.v1.decode_service_pb2_grpc import DecodeServiceStub
from zipserve.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse, ReleaseHandleRequest
from zipserve.v1.prefill_service_pb2_grpc import PrefillServiceStub
from zipserve.v1.sampling_pb2 import SamplingParams

GREEDY = SamplingParams(temperature=0.0, seed=1)
_TIMEOUT_S = 300.0
_TOKENS = 8
"""That every sequence decodes in a setting, at least."""
_TOKENS_MIXED = 12


async def drive(cluster: Cluster, seconds: float, tokens_max: int, seed: int = 0) -> None:
    """Keeps all workers busy for a time, side by side, as load does.

    Raises:
        ZipserveError: a worker refuses or fails.
    """
    drivers = [
        _Driver(worker, cluster.channels, tokens_max, Random(f"{seed} {worker.name}"))  # noqa: S311  these are lengths
        for worker in cluster.workers
    ]
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(driver.run() for driver in drivers))


async def prefilled(channels: ChannelPool, worker: Watched, token_ids: Sequence[int]) -> PrefillResponse:
    """Has a prompt computed; its KV is to be pulled, or released."""
    request = PrefillRequest(
        request_id=request_id(),
        token_ids=token_ids,
        prompt_tokens=len(token_ids),
        sampling=GREEDY,
        layout_fingerprint=worker.record.capabilities.writable_layout,
    )
    with client_errors():
        return await PrefillServiceStub(channels.get(worker.address)).Prefill(request, timeout=_TIMEOUT_S)


def request_id() -> str:
    """Tells our requests from others in logs."""
    return f"profile-{secrets.token_hex(6)}"


class _Driver:
    """Keeps one worker busy, for ever."""

    def __init__(self, worker: Watched, channels: ChannelPool, tokens_max: int, random: Random) -> None:
        self._worker = worker
        self._channels = channels
        self._random = random
        self._limits: Limits = worker.limits(tokens_max)
        self._vocab_tokens = worker.record.capabilities.vocab_tokens
        self._settings = 0
        """That were tried."""
        self._lanes: list[list[int]] = []
        """Beginnings of the sequences that decode: always the same ones, so that most of their KV is still there."""

    async def run(self) -> None:
        """Loads the worker until it is cancelled.

        Raises:
            InvalidRequestError: it has no room for anything.
        """
        while True:
            before = self._settings
            if self._worker.role == "prefill":
                for lengths in grid.prompts(self._limits, self._random):
                    await self._admitted(asyncio.gather(*map(self._prefill, lengths)))
            else:
                await self._decode_round()
            if self._settings == before:
                raise InvalidRequestError(
                    f"{self._worker.name} has no room for any prompt: {self._limits}", field="grid"
                )

    async def _decode_round(self) -> None:
        """Prompts by themselves, and sequences that decode, with and without prompts beside them, in turns."""
        lengths = grid.prompts(self._limits, self._random)
        for rows in grid.rows(self._limits, self._random):
            await self._admitted(self._decode(rows))
            if (batch := next(lengths, None)) is not None:
                await self._admitted(asyncio.gather(*map(self._compute, batch)))

    async def _admitted(self, work: Awaitable[object]) -> None:
        """What a busy worker has no room for is left out."""
        self._settings += 1
        with suppress(OverloadedError, DeadlineError):
            await work

    async def _prefill(self, tokens: int) -> None:
        answer = await prefilled(self._channels, self._worker, self._ids(tokens))
        stub = PrefillServiceStub(self._channels.get(self._worker.address))
        with client_errors():
            await stub.ReleaseHandle(ReleaseHandleRequest(handle=answer.handle), timeout=_TIMEOUT_S)

    async def _compute(self, tokens: int) -> None:
        """A prompt on a decode worker."""
        await self._stream(self._ids(tokens), 1, lambda _: None)

    async def _decode(self, rows: Rows) -> None:
        """Has all sequences decode until the last one to begin has its tokens.

        Their prompts are computed before: beside sequences that decode they would take long.
        """
        await asyncio.gather(*(self._prepare(lane, context) for lane, context in enumerate(rows.contexts)))
        wanted = _TOKENS_MIXED if rows.beside else _TOKENS
        left, done = [wanted] * len(rows.contexts), asyncio.Event()

        def counting(lane: int) -> Callable[[int], None]:
            def count(tokens: int) -> None:
                left[lane] -= tokens
                if max(left) <= 0:
                    done.set()

            return count

        tasks: list[Coroutine[Any, Any, None]] = [
            self._stream(self._lane(lane)[:context], grid.ROOM_TOKENS, counting(lane))
            for lane, context in enumerate(rows.contexts)
        ]
        if rows.beside:
            tasks.append(self._computing(rows.beside))
        await _until(done, tasks)

    async def _prepare(self, lane: int, context: int) -> None:
        """Computes the whole blocks of a sequence, unless they are still there."""
        block_tokens = self._limits.block_tokens
        if context > block_tokens:
            await self._stream(self._lane(lane)[: context // block_tokens * block_tokens + 1], 1, lambda _: None)

    async def _computing(self, lengths: Sequence[int]) -> None:
        for tokens in cycle(lengths):
            await self._admitted(self._compute(tokens))

    async def _stream(self, token_ids: Sequence[int], new_tokens: int, on_tokens: Callable[[int], None]) -> None:
        request = DecodeRequest(
            request_id=request_id(),
            prompt_token_ids=token_ids,
            prompt_tokens=len(token_ids),
            sampling=GREEDY,
            max_new_tokens=new_tokens,
        )
        with client_errors():
            stub = DecodeServiceStub(self._channels.get(self._worker.address))
            async for event in stub.Decode(request, timeout=_TIMEOUT_S):
                if event.HasField("tokens"):
                    on_tokens(len(event.tokens.token_ids))

    def _ids(self, tokens: int) -> list[int]:
        return [self._random.randrange(self._vocab_tokens) for _ in range(tokens)]

    def _lane(self, lane: int) -> list[int]:
        while len(self._lanes) <= lane:
            self._lanes.append(self._ids(self._limits.tokens_max))
        return self._lanes[lane]


async def _until(done: asyncio.Event, work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all of it until `done` is set or one fails, then ends what is left."""
    waiting = asyncio.create_task(done.wait())
    tasks = [asyncio.create_task(each) for each in work]
    try:
        pending: set[Any] = {waiting, *tasks}
        while not waiting.done() and len(pending) > 1:
            ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in ended - {waiting}:
                task.result()
    finally:
        for task in (waiting, *tasks):
            task.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)
