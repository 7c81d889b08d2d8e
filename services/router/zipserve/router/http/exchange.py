"""One HTTP request and its answer, over ASGI."""

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from zipserve.common import tracing
from zipserve.common.errors import DeadlineError, InvalidRequestError
from zipserve.router.http.fields import dumps
from zipserve.router.http.problem import Problem, Refused, refusal
from zipserve.router.http.sse import error_event
from zipserve.router.request_id import request_id

TIMEOUT_HEADER = "x-request-timeout-s"
_JSON = "application/json"
_GOODBYE_S = 1.0
"""Longest wait for a reader who is told that its stream has failed."""


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Exchange:
    """A request, and what is answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = Headers(scope=scope)
        self.path_params: Mapping[str, Any] = scope.get("path_params", {})
        self.request_id = request_id(self.headers.get(tracing.REQUEST_ID_KEY))
        self.opened = False
        """Whether the answer has begun."""
        self._receive, self._send = receive, send

    def asked_s(self) -> float | None:
        """Time that the client gives its request; None: it says nothing.

        Raises:
            InvalidRequestError: its header is no number.
            DeadlineError: it has passed.
        """
        given = self.headers.get(TIMEOUT_HEADER)
        if given is None:
            return None
        try:
            timeout_s = float(given)
        except ValueError:
            timeout_s = float("nan")
        if timeout_s != timeout_s:  # noqa: PLR0124  NaN
            raise InvalidRequestError(
                f"{TIMEOUT_HEADER} is {given[:64]!r}, must be a number of seconds", field=TIMEOUT_HEADER
            )
        if timeout_s <= 0:
            raise DeadlineError(f"the deadline has passed: {TIMEOUT_HEADER} is {given[:64]}")
        return timeout_s

    async def body(self, bytes_max: int) -> bytes:
        """The whole body, which is JSON by its header.

        Raises:
            Refused: it is something else, or too large.
            ClientGoneError: it does not come to its end.
        """
        kind = self.headers.get("content-type", "")
        # browsers send other kinds from any page to any server without asking it first
        if kind.partition(";")[0].strip().lower() != _JSON:
            raise Refused(refusal(415, f"content-type is {kind[:64]!r}, must be {_JSON}", "unsupported_media_type"))
        length = self.headers.get("content-length", "")
        if length.isdecimal() and len(length) <= 20 and int(length) > bytes_max:
            raise _too_large(int(length), bytes_max)
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            if len(body) > bytes_max:
                raise _too_large(len(body), bytes_max)
            if not message.get("more_body", False):
                return bytes(body)

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Does some work, and cancels it as soon as the client is gone; call it when the body has been read.

        Raises:
            ClientGoneError: it was cancelled.
        """
        working, gone = asyncio.create_task(work), asyncio.create_task(self._gone())
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGoneError
            await working
        finally:
            working.cancel()
            gone.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    async def answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answers with a JSON value."""
        await self.answer_bytes(status, dumps(body).encode(), {"content-type": _JSON, **(headers or {})})

    async def answer_bytes(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Answers with anything."""
        await self._begin(status, {**headers, "content-length": str(len(body))})
        await self.write(body, more=False)

    async def open_stream(self) -> None:
        """Begins a stream of events."""
        await self._begin(
            200,
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # of a proxy in between
            },
        )

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Sends more of the answer; waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def tell(self, problem: Problem) -> None:
        """Answers with an error, or ends a stream with one."""
        if not self.opened:
            await self.answer(problem.status, problem.body, problem.headers)
            return
        # a reader who does not read is not waited for: the server closes what was not ended
        with suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self.write(error_event(problem.body), more=False)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.opened = True
        named = {**headers, tracing.REQUEST_ID_KEY: self.request_id}
        encoded = [(name.encode(), value.encode()) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _too_large(size: int, bytes_max: int) -> Refused:
    message = f"the body has {size} bytes or more, at most {bytes_max} are allowed"
    # the rest is read and dropped by the server: a connection closed before that would lose the answer
    return Refused(refusal(413, message, "body_too_large"))
