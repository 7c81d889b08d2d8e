"""The routes, as an ASGI application over a Frontend: bodies to the domain and back; decides nothing."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zipserve.common.errors import ZipserveError
from zipserve.common.metrics import Metrics
from zipserve.router.caller import ANYBODY, Caller
from zipserve.router.config import RouterSettings
from zipserve.router.frontend import Frontend
from zipserve.router.http.answer import Head
from zipserve.router.http.chat_answer import ChatAnswer, ChatStream, ChatStyle
from zipserve.router.http.chat_request import ChatRequest
from zipserve.router.http.completion_answer import CompletionAnswer, CompletionStream, CompletionStyle
from zipserve.router.http.completion_request import CompletionRequest
from zipserve.router.http.endpoint import Endpoint
from zipserve.router.http.exchange import Exchange
from zipserve.router.http.fields import parse
from zipserve.router.http.generation import Call, answer_stream, answer_whole, generate
from zipserve.router.http.logprobs import Tokens
from zipserve.router.http.problem import Refused, problem_of, refusal
from zipserve.router.http.token_requests import Detokenize, tokenize_kind, tokenized
from zipserve.router.tokenizer import PromptTokenizer
from zipserve.v1.inference_service_pb2 import Model

Authenticate = Callable[[str | None], Caller]
"""Says who asks, by the header `Authorization`; raises UnauthenticatedError."""


def anybody(_: str | None) -> Caller:
    """Asks for no key."""
    return ANYBODY


class Api:
    """Answers the requests of all routes."""

    def __init__(
        self,
        frontend: Frontend,
        tokenizer: PromptTokenizer,
        settings: RouterSettings,
        metrics: Metrics,
        authenticate: Authenticate = anybody,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._frontend = frontend
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = metrics
        self._authenticate = authenticate
        self._clock = clock
        self._created_s = int(clock())
        self._tokens = Tokens(tokenizer.bytes_of, tokenizer.special_ids)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.completions),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{id:path}", self.model),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/version", self.version),
        ]
        app = Starlette(
            routes=[
                Route(path, Endpoint(f"{method} {path}", handle, self._metrics), methods=[method])
                for method, path, handle in routes
            ],
            exception_handlers={HTTPException: _no_route},
        )
        app.router.redirect_slashes = False
        return app

    async def chat(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions."""
        call = await self._call(exchange)
        asked = parse(ChatRequest, call.body)
        request = asked.to_generate(tools_known=self._tokenizer.hermes)
        style = ChatStyle(logprobs=bool(asked.logprobs), calls=bool(asked.offered), usage=asked.tells_usage)
        head = self._head(f"chatcmpl-{call.request_id}")
        events = generate(self._frontend, call, [request], [asked.names])
        if asked.streams:
            stream = ChatStream(head, self._tokens, style, _call_id)
            await answer_stream(exchange, call, events, 1, lambda _, event: stream.take(event), stream.end)
        else:
            answer = ChatAnswer(head, self._tokens, style, _call_id)
            await answer_whole(exchange, call, events, lambda _, event: answer.take(event), answer.body)

    async def completions(self, exchange: Exchange) -> None:
        """POST /v1/completions."""
        call = await self._call(exchange)
        asked = parse(CompletionRequest, call.body)
        # of more than may ever be in flight together, some would be refused each time
        in_flight_max = min(self._settings.requests_max, call.caller.requests_max or self._settings.requests_max)
        requests = asked.to_generate(min(self._settings.http_prompts_max, in_flight_max))
        echo = None
        if asked.echo:
            echo = tuple([p if isinstance(p, str) else await self._text(asked.model, p, call) for p in asked.prompt])
        style = CompletionStyle(
            n=asked.n or 1,
            logprobs=asked.logprobs is not None,
            echo=echo,
            only_echo=asked.only_echo,
            prompt_logprobs=asked.prompt_logprobs is not None,
            usage=asked.tells_usage,
        )
        head = self._head(f"cmpl-{call.request_id}")
        events = generate(self._frontend, call, requests, [asked.names(i) for i in range(len(requests))])
        if asked.streams:
            stream = CompletionStream(head, self._tokens, style)
            await answer_stream(exchange, call, events, len(requests), stream.take, stream.end)
        else:
            answer = CompletionAnswer(head, self._tokens, style)
            await answer_whole(exchange, call, events, answer.take, answer.body)

    async def models(self, exchange: Exchange) -> None:
        """GET /v1/models."""
        self._authenticated(exchange)
        await exchange.answer(200, {"object": "list", "data": [self._model(self._frontend.served())]})

    async def model(self, exchange: Exchange) -> None:
        """GET /v1/models/{id}."""
        self._authenticated(exchange)
        await exchange.answer(200, self._model(self._frontend.served(exchange.path_params["id"])))

    async def tokenize(self, exchange: Exchange) -> None:
        """POST /tokenize."""
        call = await self._call(exchange)
        asked = parse(tokenize_kind(call.body), call.body)
        token_ids = await self._frontend.tokenize(asked.to_proto(), call.deadline, call.caller)
        texts = [self._tokens.text(token_id) for token_id in token_ids] if asked.return_token_strs else None
        await exchange.answer(200, tokenized(token_ids, self._frontend.facts().context_tokens, texts))

    async def detokenize(self, exchange: Exchange) -> None:
        """POST /detokenize."""
        call = await self._call(exchange)
        asked = parse(Detokenize, call.body)
        try:
            text = await self._frontend.detokenize(asked.model or "", asked.tokens, call.deadline, call.caller)
        except ZipserveError as error:
            raise Refused(problem_of(error, {"token_ids": "tokens"})) from error
        await exchange.answer(200, {"prompt": text})

    async def health(self, exchange: Exchange) -> None:
        """GET /health."""
        if self._frontend.draining:
            await exchange.answer(503, {"status": "draining"})
        else:
            await exchange.answer(200, {"status": "serving"})

    async def metrics(self, exchange: Exchange) -> None:
        """GET /metrics: for those who have a key, since it names callers; `metrics_port` asks for none."""
        self._authenticated(exchange)
        body = generate_latest(self._metrics.registry)
        await exchange.answer_bytes(200, body, {"content-type": CONTENT_TYPE_LATEST})

    async def version(self, exchange: Exchange) -> None:
        """GET /version."""
        await exchange.answer(200, {"version": version("zipserve")})

    def _authenticated(self, exchange: Exchange) -> Caller:
        return self._authenticate(exchange.headers.get("authorization"))

    async def _call(self, exchange: Exchange) -> Call:
        caller = self._authenticated(exchange)
        deadline = self._frontend.deadline(exchange.asked_s())
        async with asyncio.timeout(deadline.remaining_s()):
            body = await exchange.body(self._settings.http_body_bytes_max)
        return Call(exchange.request_id, caller, deadline, body)

    async def _text(self, model: str | None, token_ids: Sequence[int], call: Call) -> str:
        try:
            return await self._frontend.detokenize(model or "", token_ids, call.deadline, call.caller)
        except ZipserveError as error:
            raise Refused(problem_of(error, {"token_ids": "prompt"})) from error

    def _head(self, answer_id: str) -> Head:
        model = self._frontend.model
        return Head(answer_id, int(self._clock()), model.name, model.revision)

    def _model(self, model: Model) -> dict[str, Any]:
        return {
            "id": model.id,
            "object": "model",
            "created": self._created_s,
            "owned_by": "zipserve",
            "max_model_len": model.context_tokens,
        }


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _no_route(request: Request, error: Exception) -> Response:
    """What HTTP itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:256]}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    problem = refusal(error.status_code, f"{what}: {error.detail}", code, dict(error.headers or {}))
    return JSONResponse(problem.body, problem.status, problem.headers)
