"""The load of `zipserve bench serve`: when requests arrive, that nothing holds them back, and what is made of them."""

import asyncio
import itertools
import json
import math
import random
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_server import FakeInference, serving
from zipserve.bench.__main__ import main
from zipserve.bench.serve.arrivals import Arrival, Length, drawn, prompts, read_trace, times
from zipserve.bench.serve.drive import drive
from zipserve.bench.serve.endpoints import GrpcEndpoint, HttpEndpoint, Prompt, find_model
from zipserve.bench.serve.records import Objective, Record, quantile, summary
from zipserve.client import AsyncClient
from zipserve.common.errors import InvalidRequestError, OverloadedError, WorkerLostError


@pytest.mark.parametrize(
    ("process", "burstiness", "variation"), [("constant", 1.0, 0.0), ("poisson", 1.0, 1.0), ("gamma", 3.0, 3.0)]
)
def test_arrival_times(process: str, burstiness: float, variation: float) -> None:
    at = list(itertools.islice(times(process, 10.0, random.Random(3), burstiness), 20_000))
    assert at == sorted(at)
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.1)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, rel=0.15, abs=1e-6)
    assert at == list(itertools.islice(times(process, 10.0, random.Random(3), burstiness), 20_000))


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [("7", 7, 7, 7), ("uniform:5:9", 5, 9, 7), ("normal:100:10", 1, 200, 100), ("lognormal:50:0.5", 1, 5000, 56.7)],
)
def test_lengths(text: str, low: int, high: int, mean: float) -> None:
    length, randomness = Length.parse(text), random.Random(1)
    drawn_lengths = [length.draw(randomness) for _ in range(5_000)]
    assert low <= min(drawn_lengths) <= max(drawn_lengths) <= high
    assert statistics.mean(drawn_lengths) == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("text", ["", "x", "0", "uniform:3", "normal:1:2:3", "zipf:2"])
def test_no_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|float"):
        Length.parse(text)


def test_traces(tmp_path: Path) -> None:
    rows = [(2.0, 30, 4), (0.5, 10, 2)]
    names = ("arrival_s", "prompt_tokens", "output_tokens")
    table, lines = tmp_path / "t.csv", tmp_path / "t.jsonl"
    table.write_text("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)]))
    lines.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    expected = [Arrival(0.25, 10, 2), Arrival(1.0, 30, 4)]
    assert read_trace(table, speed=2.0) == expected == read_trace(lines, speed=2.0)
    for broken in ("arrival_s,prompt_tokens\n1,2", "arrival_s,prompt_tokens,output_tokens\n1,x,3", '{"arrival_s": 1}'):
        table.write_text(broken)
        with pytest.raises(InvalidRequestError, match="request 1: needs the numbers"):
            read_trace(table)
    table.write_text("arrival_s,prompt_tokens,output_tokens\n1,0,3")
    with pytest.raises(InvalidRequestError, match="out of range"):
        read_trace(table)


def test_prompts_have_the_asked_length_and_differ() -> None:
    due = drawn(20, iter(range(20)), Length.parse("uniform:3:9"), Length.parse("2"), random.Random(1))
    found = prompts(due, [], 800, random.Random(2))
    assert [len(ids) for ids in found] == [arrival.prompt_tokens for arrival in due]
    assert all(100 <= token_id < 800 for ids in found for token_id in ids)
    assert len({tuple(ids) for ids in found}) == 20
    text = list(range(5))
    for ids, arrival in zip(prompts(due, text, 0, random.Random(2)), due, strict=True):
        assert ids == [(ids[0] + i) % 5 for i in range(arrival.prompt_tokens)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_are_those_of_statistics(values: list[float], q: float) -> None:
    found = quantile([*values, math.nan], q)
    assert min(values) <= found <= max(values)
    assert quantile(values, 0.5) == pytest.approx(statistics.median(values))
    if len(values) > 1:
        percentiles = statistics.quantiles(values, n=100, method="inclusive")
        assert quantile(values, 0.9) == pytest.approx(percentiles[89], rel=1e-6, abs=1e-6)


def test_quantile_of_nothing() -> None:
    assert math.isnan(quantile([], 0.5))


def _record(due_s: float, *arrivals: tuple[float, int], error: str = "", sent_s: float | None = None) -> Record:
    last_s = arrivals[-1][0] if arrivals else due_s + 1
    return Record(due_s, 10, due_s if sent_s is None else sent_s, list(arrivals), last_s, error)


def test_times_of_a_record() -> None:
    record = _record(1.0, (1.5, 2), (2.0, 1), (3.0, 2), sent_s=1.25)
    assert (record.ttft_s, record.lag_s, record.e2e_s, record.tokens) == (0.5, 0.25, 2.0, 5)
    assert record.tpot_s == 0.5  # 1.5 s for the three tokens after the first arrival
    assert record.gaps_s() == [0.5, 1.0]
    one = _record(1.0, (1.5, 1))
    assert (one.ttft_s, one.gaps_s()) == (0.5, [])
    assert math.isnan(one.tpot_s)
    assert math.isnan(_record(0.0).ttft_s)


def test_goodput_and_errors() -> None:
    records = [
        _record(0.0, (0.1, 1), (0.3, 2)),  # keeps both: TTFT 0.1, TPOT 0.1
        _record(0.0, (0.6, 1), (0.7, 1)),  # late
        _record(1.0, (1.1, 1), (1.5, 1)),  # slow
        _record(1.0, (1.2, 1)),  # one token only
        _record(2.0, error="OVERLOADED"),
    ]
    found = summary(records, Objective(ttft_s=0.5, tpot_s=0.2))
    assert found["goodput"]["share"] == pytest.approx(2 / 5)
    assert found["seconds"] == 3.0
    assert found["goodput"]["requests_per_s"] == pytest.approx(2 / 3)
    assert found["requests_per_s"] == pytest.approx(4 / 3)
    assert found["output_tokens_per_s"] == pytest.approx(8 / 3)
    assert found["errors"] == {"OVERLOADED": 1}
    assert found["ttft_s"]["p50"] == pytest.approx(0.15)
    assert summary(records, Objective())["goodput"]["share"] == pytest.approx(4 / 5)


async def test_slow_answers_hold_nothing_back() -> None:
    """Coordinated omission: every request is sent when it is due, though none has been answered."""
    answered = asyncio.Event()
    sent: list[float] = []

    async def ask(prompt: Prompt, output_tokens: int, record: Record) -> None:
        record.sent_s = time.perf_counter()
        sent.append(record.sent_s)
        if len(sent) == 20:
            answered.set()
        await answered.wait()
        record.arrivals.append((time.perf_counter(), 1))

    due = [Arrival(0.005 * i, 1, 1) for i in range(20)]
    async with asyncio.timeout(10):
        records = await drive(ask, due, [[1]] * 20)
    assert [record.sent_s for record in records] == sent
    assert all(record.lag_s >= 0 for record in records)
    assert records[0].ttft_s >= 0.005 * 19


async def test_what_the_client_is_late_by_is_told() -> None:
    async def ask(prompt: Prompt, output_tokens: int, record: Record) -> None:
        record.sent_s = time.perf_counter()
        if prompt == [0]:
            time.sleep(0.05)  # noqa: ASYNC251  the client itself stalls
        record.arrivals.append((time.perf_counter(), 1))

    records = await drive(ask, [Arrival(0.0, 1, 1), Arrival(0.01, 1, 1)], [[0], [1]])
    assert records[1].lag_s >= 0.03
    assert records[1].ttft_s >= records[1].lag_s


async def test_grpc() -> None:
    fake = FakeInference()
    with serving(fake) as address:
        async with AsyncClient(address) as client:
            endpoint = GrpcEndpoint(client, 10.0)
            record = Record(0.0, 2)
            await endpoint.ask([5, 6], 3, record)
            assert ([count for _, count in record.arrivals], record.error) == ([1, 2], "")
            assert record.server["prefill_s"] == pytest.approx(0.02)
            fake.fail(OverloadedError("full"))
            await endpoint.ask([5, 6], 3, record)
            assert record.error == "OVERLOADED"
    request = fake.requests[0]
    assert (list(request.token_ids.ids), request.stop.max_tokens, request.stop.ignore_eos) == ([5, 6], 3, True)


class OpenAi(BaseHTTPRequestHandler):
    """Three events for four tokens; prompts with "fail" are refused, with "cut" broken off."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._begin(200)
        self.wfile.write(json.dumps({"data": [{"id": "rival"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        if "fail" in body["prompt"]:
            self._begin(429)
            return
        self._begin(200)
        events: list[Any] = [{"choices": [{"text": text}]} for text in ("a", "", "b", "cd")]
        for event in [*events, {"choices": [], "usage": {"completion_tokens": 4}}]:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if "cut" not in body["prompt"]:
            self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()


@pytest.fixture
def openai_url() -> Iterator[str]:
    OpenAi.bodies.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), OpenAi)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_http(openai_url: str) -> None:
    async with httpx.AsyncClient(base_url=openai_url) as client:
        assert await find_model(client) == "rival"
        endpoint = HttpEndpoint(client, "rival")
        records = [Record(0.0, 2) for _ in range(3)]
        for prompt, record in zip(("go", "fail", "cut"), records, strict=True):
            await endpoint.ask(prompt, 4, record)
    good, refused, cut = records
    assert ([count for _, count in good.arrivals], good.error) == ([1, 1, 2], "")
    assert (refused.arrivals, refused.error) == ([], "HTTP_429")
    assert cut.error == "InternalError: the stream ended without [DONE]"
    assert OpenAi.bodies[0]["max_tokens"] == 4


async def test_an_endpoint_that_is_not_there(unused_tcp_port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{unused_tcp_port}") as client:
        record = Record(0.0, 1)
        await HttpEndpoint(client, "m").ask("x", 1, record)
        assert record.error == "ConnectError"
        with pytest.raises(WorkerLostError, match="lists no models"):
            await find_model(client)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    status = main(["serve", "--quick", "--json", "--rate", "200", *arguments])
    out = capsys.readouterr().out
    return status, json.loads(out.splitlines()[-1]), out


def test_the_command_against_grpc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake, picture = FakeInference(), tmp_path / "plot.png"
    with serving(fake) as address:
        status, found, out = _run(
            capsys, "--address", address, "--slo-ttft-ms", "5000", "--slo-tpot-ms", "5000", "--plot", str(picture)
        )
    assert status == 0
    assert (found["requests"], found["errors"], found["goodput"]["share"]) == (8, {}, 1.0)
    assert len(fake.requests) == 8 + 4  # with those to warm up
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "goodput: 100.0% keep the objectives" in out


def test_the_command_against_http(openai_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, text = tmp_path / "t.csv", tmp_path / "t.txt"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,3,4\n0.01,5,4\n")
    text.write_text("fail " * 100)
    arguments = ("--http", openai_url, "--trace", str(trace), "--warm-up", "0")
    assert _run(capsys, *arguments)[:2][0] == 0
    assert [len(body["prompt"]) for body in OpenAi.bodies] == [3, 5]
    status, found, _ = _run(capsys, *arguments, "--text", str(text))
    assert (status, found["errors"]) == (1, {"HTTP_429": 2})
    assert [len(body["prompt"]) for body in OpenAi.bodies[2:]] == [12, 20]
