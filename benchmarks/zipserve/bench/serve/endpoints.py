"""Endpoints under test: zipserve's gRPC, or any server of OpenAI's completions over SSE."""

import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias

import httpx

from zipserve.bench.serve.records import Record
from zipserve.client import AsyncClient, Delta, Finished
from zipserve.common.errors import InternalError, OverloadedError, WorkerLostError, ZipserveError

Prompt: TypeAlias = list[int] | str
Ask: TypeAlias = Callable[[Prompt, int, Record], Coroutine[Any, Any, None]]
"""Sends a prompt, asks for so many tokens, and notes what comes and when in the record. Errors go into the record."""

_DONE = "[DONE]"


class GrpcEndpoint:
    """A zipserve router."""

    def __init__(self, client: AsyncClient, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def ask(self, prompt: Prompt, output_tokens: int, record: Record) -> None:
        """See `Ask`."""
        record.sent_s = time.perf_counter()
        try:
            stream = self._client.generate(
                prompt, max_tokens=output_tokens, ignore_eos=True, temperature=0.0, timeout_s=self._timeout_s
            )
            async for event in stream:
                if isinstance(event, Delta):
                    if event.token_ids:
                        record.arrivals.append((time.perf_counter(), len(event.token_ids)))
                elif isinstance(event, Finished):
                    times = event.timings
                    record.server = {
                        "prefill_s": times.prefill.ToTimedelta().total_seconds(),
                        "queue_s": times.queue.ToTimedelta().total_seconds(),
                        "transfer_s": times.transfer.ToTimedelta().total_seconds(),
                    }
        except ZipserveError as error:
            record.error = error.reason
        record.ended_s = time.perf_counter()


class HttpEndpoint:
    """A server of OpenAI's `/v1/completions`: zipserve, vLLM, SGLang, llama.cpp …"""

    def __init__(self, client: httpx.AsyncClient, model: str, extra: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            client: with the server's address as its base URL, keys and limits of time.
            extra: fields of every request that only some servers know. With vLLM's `return_token_ids` tokens are
                counted by their ids, also those without text of their own.
        """
        self._client = client
        self.model = model
        self._extra = extra or {}

    async def ask(self, prompt: Prompt, output_tokens: int, record: Record) -> None:
        """See `Ask`."""
        record.sent_s = time.perf_counter()
        await self.stream(prompt, output_tokens, record)

    async def stream(self, prompt: Prompt, output_tokens: int, record: Record, **extra: Any) -> None:
        """As `ask`, for a request that was sent before; `extra` are more fields of this one."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **self._extra,
            **extra,
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    record.error = f"HTTP_{response.status_code}"
                else:
                    await _read(response, record)
        except httpx.HTTPError as error:
            record.error = type(error).__name__
        except (ZipserveError, ValueError, LookupError) as error:
            record.error = f"{type(error).__name__}: {error}"[:200]
        record.ended_s = time.perf_counter()


async def _read(response: httpx.Response, record: Record) -> None:
    tokens = 0
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == _DONE:
            break
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise InternalError(str(event["error"]))
        if came := sum(_tokens(choice) for choice in event.get("choices", ())):
            record.arrivals.append((time.perf_counter(), came))
        tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
    else:
        raise InternalError("the stream ended without [DONE]")
    _spread(record, tokens)


def _tokens(choice: Mapping[str, Any]) -> int:
    """That came with a choice of an event: as many as it has ids, else one if it has text."""
    ids = choice.get("token_ids")
    return len(ids) if ids is not None else int(bool(choice.get("text")))


def _spread(record: Record, tokens: int) -> None:
    """Where events do not say how many tokens they bring: what the usage tells beyond one each came with the last."""
    if record.arrivals and tokens > record.tokens:
        at_s, came = record.arrivals[-1]
        record.arrivals[-1] = at_s, came + tokens - record.tokens


async def find_model(client: httpx.AsyncClient) -> str:
    """The id of the first model that a server lists.

    Raises:
        WorkerLostError: it does not answer.
        OverloadedError: it lists none.
    """
    try:
        models: Sequence[dict[str, Any]] = (await client.get("/v1/models")).raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise WorkerLostError(f"{client.base_url} lists no models: {error}") from error
    if not models:
        raise OverloadedError(f"{client.base_url} serves no model yet")
    return str(models[0]["id"])
