"""Runs the requests of one exchange through the frontend, and writes what comes of them while the client is there."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from zipserve.common.errors import ZipserveError
from zipserve.common.rpc.channel import Deadline
from zipserve.router.caller import Caller
from zipserve.router.frontend import Event, Frontend, Started
from zipserve.router.http.exchange import Exchange
from zipserve.router.http.problem import Refused, problem_of
from zipserve.router.merge import merge
from zipserve.v1.inference_service_pb2 import GenerateRequest

_MARGIN_S = 1.0
"""The frontend ends a request at its deadline; so much later a wait for its reader ends too."""

Events = AsyncGenerator[tuple[int, Event], None]
"""What comes of several prompts, each with the index of its prompt."""


@dataclass(frozen=True)
class Call:
    """What a request is besides the fields of its body."""

    request_id: str
    caller: Caller
    deadline: Deadline
    body: bytes


def generate(
    frontend: Frontend, call: Call, requests: Sequence[GenerateRequest], names: Sequence[Mapping[str, str]]
) -> Events:
    """The events of all requests, at once.

    Args:
        names: of each request, what fields of the domain are called in it (`problem_of`).

    Raises:
        Refused: one of them has failed; the others have ended.
    """
    if len(requests) == 1:
        return _of_prompt(frontend, call, 0, requests[0], call.request_id, names[0])
    return merge(
        [
            _of_prompt(frontend, call, i, request, f"{call.request_id}-{i}", names[i])
            for i, request in enumerate(requests)
        ]
    )


async def answer_whole(
    exchange: Exchange, call: Call, events: Events, take: Callable[[int, Event], None], body: Callable[[], Any]
) -> None:
    """Answers when all events were taken."""

    async def work() -> None:
        async with asyncio.timeout(call.deadline.remaining_s() + _MARGIN_S), aclosing(events):
            async for index, event in events:
                take(index, event)
            await exchange.answer(200, body())

    await exchange.while_connected(work())


async def answer_stream(
    exchange: Exchange,
    call: Call,
    events: Events,
    prompts: int,
    take: Callable[[int, Event], bytes],
    end: Callable[[], bytes],
) -> None:
    """Answers with what each event makes. It begins when all prompts were admitted and something came of one, so that
    what fails before has a status of its own.
    """

    async def work() -> None:
        waiting, held = prompts, b""
        async with asyncio.timeout(call.deadline.remaining_s() + _MARGIN_S), aclosing(events):
            async for index, event in events:
                chunks = take(index, event)
                if not exchange.opened:
                    held += chunks
                    waiting -= isinstance(event, Started)
                    if waiting or isinstance(event, Started):
                        continue
                    await exchange.open_stream()
                    chunks = held
                if chunks:
                    await exchange.write(chunks)
            await exchange.write(end(), more=False)

    await exchange.while_connected(work())


async def _of_prompt(
    frontend: Frontend, call: Call, index: int, request: GenerateRequest, request_id: str, names: Mapping[str, str]
) -> Events:
    try:
        async with aclosing(frontend.generate(request, request_id, call.deadline, call.caller, "http")) as events:
            async for event in events:
                yield index, event
    except ZipserveError as error:
        raise Refused(problem_of(error, names)) from error
