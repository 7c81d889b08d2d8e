"""What every route does around its own work: request id, span, metrics, and errors turned into answers."""

import time
from collections.abc import Awaitable, Callable

import structlog
from starlette.types import Receive, Scope, Send

from zipserve.common import log, tracing
from zipserve.common.errors import DeadlineError, InternalError, ZipserveError
from zipserve.common.metrics import Metrics
from zipserve.router.http.exchange import ClientGoneError, Exchange
from zipserve.router.http.problem import Problem, Refused, problem_of

_log = log.get()


class Endpoint:
    """An ASGI application of one route.

    Args:
        method: its name in metrics and spans.
        handle: reads an exchange's request and answers it.
    """

    def __init__(self, method: str, handle: Callable[[Exchange], Awaitable[None]], metrics: Metrics) -> None:
        self._method = method
        self._handle = handle
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        exchange = Exchange(scope, receive, send)
        started_s = time.monotonic()
        bound = structlog.contextvars.bound_contextvars(request_id=exchange.request_id)
        reason = "CANCELLED"
        with bound, tracing.server_span(self._method, exchange.headers.items()):
            try:
                reason = await self._reason(exchange)
            finally:
                self._metrics.rpcs.labels(self._method, reason).inc()
                self._metrics.rpc_seconds.labels(self._method).observe(time.monotonic() - started_s)

    async def _reason(self, exchange: Exchange) -> str:
        """Answers; returns how that ended."""
        try:
            await self._handle(exchange)
        except ClientGoneError:
            return "CANCELLED"
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets a typed error
            problem = self._problem(error)
            await exchange.tell(problem)
            return problem.reason
        return "OK"

    def _problem(self, error: Exception) -> Problem:
        if isinstance(error, Refused):
            return error.problem
        if isinstance(error, ZipserveError):
            return problem_of(error)
        if isinstance(error, TimeoutError):
            return problem_of(DeadlineError("the deadline has passed"))
        _log.error("http.failed", method=self._method, exc_info=error)
        return problem_of(InternalError("internal error; the server's log has the details"))
