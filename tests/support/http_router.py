"""A router with its HTTP side, as clients of OpenAI's API see it."""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from openai import AsyncOpenAI

from router_cluster import Cluster, build
from router_model import EOS, byte_tokenizer
from router_peers import Peer
from zipserve.common.models import ModelFiles


class HttpCluster:
    """A router, its fake workers, and clients that talk to it."""

    def __init__(self, cluster: Cluster, http: httpx.AsyncClient, openai: AsyncOpenAI) -> None:
        self.cluster = cluster
        self.http = http
        self.openai = openai

    @property
    def address(self) -> str:
        """host:port."""
        return self.cluster.service.http_address

    async def workers(self, **script: Any) -> tuple[Peer, Peer]:
        """Adds one worker of each kind."""
        return await self.cluster.add("p0", **script), await self.cluster.add("d0", **script)

    async def chat(self, **fields: Any) -> httpx.Response:
        """A chat request, with one message unless the fields have others."""
        fields = {"messages": [{"role": "user", "content": "x"}], **fields}
        return await self.http.post("/v1/chat/completions", json=fields)

    async def complete(self, **fields: Any) -> httpx.Response:
        """A completion request."""
        return await self.http.post("/v1/completions", json={"prompt": "abc", **fields})


async def build_http(stack: AsyncExitStack, model: ModelFiles, redis_url: str, **settings: Any) -> HttpCluster:
    """Starts a router without workers; it ends with the stack."""
    cluster = await build(stack, model, redis_url, http_listen="127.0.0.1:0", **settings)
    base = f"http://{cluster.service.http_address}"
    http = await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=20))
    openai = await stack.enter_async_context(AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0))
    return HttpCluster(cluster, http, openai)


def speak(peers: Iterable[Peer], text: str, position: int) -> None:
    """Lets workers say a text from a position on, and end."""
    ids = [*byte_tokenizer().encode(text, add_special_tokens=False).ids, EOS]

    def token(at: int, seed: int) -> int:
        return ids[min(at - position, len(ids) - 1)]

    for peer in peers:
        vars(peer)["token"] = token


def events_of(body: str) -> list[Any]:
    """The chunks of a stream that has ended as it should."""
    *events, end = [part.removeprefix("data: ") for part in body.strip().split("\n\n")]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


@asynccontextmanager
async def reading(http: httpx.AsyncClient, path: str, **fields: Any) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream, as they come."""
    async with http.stream("POST", path, json={"stream": True, **fields}) as response:
        yield response.aiter_lines()
