"""Endpoints under test: zipserve's gRPC, or any server of OpenAI's completions over SSE."""

import json
import time
from collections.abc import Callable, Coroutine, Sequence
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

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        """
        Args:
            client: with the server's address as its base URL, keys and limits of time.
        """
        self._client = client
        self._model = model

    async def ask(self, prompt: Prompt, output_tokens: int, record: Record) -> None:
        """See `Ask`."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        record.sent_s = time.perf_counter()
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
        if any(choice.get("text") for choice in event.get("choices", ())):
            record.arrivals.append((time.perf_counter(), 1))
        tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
    else:
        raise InternalError("the stream ended without [DONE]")
    _spread(record, tokens)


def _spread(record: Record, tokens: int) -> None:
    """An event does not say how many tokens it brings: what the usage tells beyond one each came with the last."""
    if record.arrivals and tokens > len(record.arrivals):
        at_s, _ = record.arrivals[-1]
        record.arrivals[-1] = at_s, 1 + tokens - len(record.arrivals)


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
