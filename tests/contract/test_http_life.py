"""A request's life over HTTP: clients that go away or do not read, failures on the way, drain, and what is told."""

import asyncio
import json
import socket
from contextlib import AsyncExitStack, suppress
from typing import Any

import httpx
import openai
import pytest

from http_router import HttpCluster, build_http, reading
from polling import until
from zipserve.common.errors import KvValueError
from zipserve.common.models import ModelFiles
from zipserve.router.http import server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def router(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> HttpCluster:
    """Without workers."""
    return await build_http(stack, model, redis_url)


async def _never_after_14(position: object) -> None:
    assert isinstance(position, int)
    if position >= 14:
        await asyncio.Event().wait()


@pytest.mark.parametrize("prompt", ["abc", ["abc", "abcd"]])
async def test_a_client_that_goes_away_in_a_stream(router: HttpCluster, prompt: Any) -> None:
    _, decode = await router.workers(at_token=_never_after_14)
    async with reading(router.http, COMPLETION, prompt=prompt, max_tokens=400) as lines:
        assert (await anext(lines)).startswith("data: ")
        await until(lambda: decode.position >= 12, "decode goes on from the handle")
    async with asyncio.timeout(1):
        await decode.cancelled.wait()
        await router.cluster.at_rest()


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_client_that_goes_away_before_its_answer(router: HttpCluster, path: str) -> None:
    _, decode = await router.workers(at_token=_never_after_14)
    prompt = {"prompt": "abc"} if path == COMPLETION else {"messages": [{"role": "user", "content": ""}]}
    asking = asyncio.create_task(router.http.post(path, json={**prompt, "max_tokens": 400}))
    await until(lambda: len(decode.requests) == 1, "it is decoded")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(1):
        await decode.cancelled.wait()
        await router.cluster.at_rest()
    metrics = (await router.http.get("/metrics")).text
    assert f'zipserve_rpcs_total{{method="POST {path}",reason="CANCELLED"}} 1.0' in metrics


async def test_a_client_that_does_not_read_is_waited_for_no_longer_than_its_deadline(router: HttpCluster) -> None:
    """What waits for it is bounded: the worker is not asked for more than fits into buffers."""
    long = 60_000
    # the router believes that the context holds them
    router.cluster.frontend._own_facts = router.cluster.frontend.facts().__class__(1 << 20, 259, frozenset([2]))
    _, decode = await router.workers(context_tokens=1 << 20)
    host, port = router.address.split(":")
    body = json.dumps({"prompt": "abc", "max_tokens": 32_000, "stream": True, "ignore_eos": True, "logprobs": 5})
    head = f"POST {COMPLETION} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-timeout-s: 3\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        await until(lambda: len(decode.requests) == 1, "it is decoded")
        await until(lambda: router.cluster.frontend.requests == 0, "its deadline has ended it", timeout_s=10)
        assert decode.position < long
        await router.cluster.at_rest()


async def test_a_failure_in_mid_stream_is_an_event(router: HttpCluster) -> None:
    async def fail(position: object) -> None:
        if position == 20:
            raise KvValueError("a fault of a test")

    await router.workers(at_token=fail)
    stream = await router.openai.completions.create(model="tiny", prompt="abc", max_tokens=90, stream=True)
    assert (await anext(stream)).choices[0].text
    with pytest.raises(openai.APIError, match="a fault of a test") as caught:
        _ = [chunk async for chunk in stream]
    assert (caught.value.type, caught.value.code) == ("server_error", "kv_value")
    response = await router.complete(max_tokens=90, stream=True)
    assert response.status_code == 200
    *_, last = response.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "a fault of a test"
    assert (await router.complete(max_tokens=90)).status_code == 500


async def test_drain(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    gate = asyncio.Event()

    async def wait(_: object) -> None:
        await gate.wait()

    life = AsyncExitStack()
    router = await build_http(life, model, redis_url)
    router.cluster.stack = stack
    await router.workers(at_token=wait)
    http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://{router.address}"))
    assert (await http.get("/health")).json() == {"status": "serving"}
    async with reading(http, COMPLETION, prompt="abc", max_tokens=5) as lines:
        first = await anext(lines)
        ending = asyncio.create_task(life.aclose())
        await until(lambda: router.cluster.frontend.draining, "it drains")
        health = await http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        refused = await http.post(COMPLETION, json={"prompt": "abc"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        gate.set()
        rest = [line async for line in lines]
    assert first.startswith("data: ")
    assert rest[-2:] == ["data: [DONE]", ""]
    async with asyncio.timeout(5):
        await ending
    with pytest.raises(httpx.TransportError):
        await http.get("/health")


async def test_request_ids(router: HttpCluster) -> None:
    prefill, _ = await router.workers()
    response = await router.http.post(COMPLETION, json={"prompt": "abc"}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    assert prefill.requests[0].request_id == "mine-1"
    await router.http.post(COMPLETION, json={"prompt": ["a", "b"]}, headers={"x-request-id": "mine-2"})
    assert {request.request_id for request in prefill.requests[1:]} == {"mine-2-0", "mine-2-1"}
    for given in ("with space", "x" * 129):
        response = await router.http.get("/health", headers={"x-request-id": given})
        assert len(response.headers["x-request-id"]) == 32
    assert (await router.complete(n=0)).headers["x-request-id"]


async def test_models(router: HttpCluster) -> None:
    models = (await router.openai.models.list()).data
    assert [(model.id, model.object, model.owned_by) for model in models] == [("tiny", "model", "zipserve")]
    assert (await router.openai.models.retrieve("tiny")).model_dump()["max_model_len"] == 512


async def test_tokenize_and_detokenize(router: HttpCluster) -> None:
    told = (await router.http.post("/tokenize", json={"prompt": "aé", "return_token_strs": True})).json()
    assert (told["count"], told["max_model_len"]) == (3, 512)
    assert told["token_strs"] == ["a", "\ufffd", "\ufffd"]
    text = (await router.http.post("/detokenize", json={"tokens": told["tokens"]})).json()
    assert text == {"prompt": "aé"}


async def test_metrics_and_version(router: HttpCluster) -> None:
    await router.http.get("/v1/models")
    response = await router.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'zipserve_rpcs_total{method="GET /v1/models",reason="OK"} 1.0' in response.text
    assert (await router.http.get("/version")).json().keys() == {"version"}


async def test_a_head_without_end_is_cut_off(router: HttpCluster) -> None:
    host, _, port = router.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /health HTTP/1.1\r\n")
    answer = asyncio.create_task(reader.read())
    sent = 0
    # what the server had not read when it hung up makes a reset of its answer
    with suppress(ConnectionError):
        while not answer.done():
            writer.write(b"x-more: " + b"y" * 1000 + b"\r\n")
            await writer.drain()
            sent += 1000
        assert b"more than 65536 bytes" in await answer
    assert answer.done()
    assert sent < 32 << 20
    writer.close()


async def test_a_head_that_does_not_come_is_not_waited_for(
    router: HttpCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_HEAD_S", 0.1)
    host, _, port = router.address.rpartition(":")
    for begins in (b"", b"GET /health HT"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(begins)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
    assert (await router.http.get("/health")).status_code == 200
