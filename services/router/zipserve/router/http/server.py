"""Serves an ASGI application with uvicorn in the event loop that is there."""

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_BACKLOG = 1024
_GRACE_S = 1
_HEAD_BYTES_MAX = 64 << 10
_HEAD_S = 10.0
"""Time for the head of a request, from the connection or from its first byte on."""


class HttpServer:
    """A running server. Make it with `start`."""

    def __init__(self, server: "_Uvicorn", listener: socket.socket, task: "asyncio.Task[None]") -> None:
        self._server = server
        host, port, *_ = listener.getsockname()
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        """host:port."""
        self.task = task
        """Ends with the server only."""

    @classmethod
    async def start(
        cls, app: ASGIApp, listen: str, *, connections_max: int, unread_s: float, tls: ssl.SSLContext | None = None
    ) -> "HttpServer":
        """Listens on host:port, where port 0 takes a free one.

        Args:
            connections_max: more are answered with 503.
            unread_s: a connection whose peer takes nothing for so long is broken off.
            tls: None: plain HTTP.

        Raises:
            OSError: the address is taken, or the host is not ours.
        """
        listener = _listen(listen, unread_s)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # every request is logged where it is answered
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=connections_max,
            timeout_graceful_shutdown=_GRACE_S,
        )
        config.load()
        config.ssl = tls  # its own settings know no certificates that change
        server = _Uvicorn(config)
        task = asyncio.create_task(server.serve(sockets=[listener]), name="http server")
        ready = asyncio.create_task(server.ready.wait())
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if task.done():
            listener.close()
            await task
        return cls(server, listener, task)

    async def stop(self) -> None:
        """Closes idle connections, gives the others a moment to end, and returns when all are closed."""
        self._server.should_exit = True
        await asyncio.shield(self.task)  # it ends by itself; who waits for it may go away


class _Protocol(HttpToolsProtocol):
    """Limits the head of a request in bytes and time, which uvicorn leaves open to anybody."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._late.cancel()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._late.cancel()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES_MAX:
                self.send_400_response(f"The head of the request has more than {_HEAD_BYTES_MAX} bytes.")

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._in_head = True
        self._late = self.loop.call_later(_HEAD_S, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the service's, which drains first."""
        yield


def _listen(address: str, unread_s: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {address}: {error.strerror}") from error
    # inherited by connections
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread_s * 1000))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return listener
