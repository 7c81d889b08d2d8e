"""`zipserve bench serve`: an open loop of requests against a running endpoint, or a stack that is started for it."""

import argparse
import asyncio
import itertools
import random
import shlex
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from zipserve.bench import report
from zipserve.bench.report import Check, above_0
from zipserve.bench.serve import arrivals as schedule
from zipserve.bench.serve import plot
from zipserve.bench.serve.arrivals import Arrival, Length
from zipserve.bench.serve.drive import drive, warm_up
from zipserve.bench.serve.endpoints import Ask, GrpcEndpoint, HttpEndpoint, Prompt, find_model
from zipserve.bench.serve.records import Objective, Record, summary
from zipserve.bench.stack import Stack
from zipserve.client import AsyncClient
from zipserve.common.errors import InvalidRequestError

_LAG_MAX_S = 0.01
_CHARS_PER_TOKEN = 4
_TOKENIZE_CHARS = 100_000


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("serve", "An open loop of requests: latencies, rates and goodput of an endpoint.")
    where = options.add_mutually_exclusive_group()
    where.add_argument("--address", metavar="HOST:PORT", help="a zipserve router (default: start a stack)")
    where.add_argument("--http", metavar="URL", help="a server of OpenAI's /v1/completions, such as a rival")
    options.add_argument("--up", default="", metavar="ARGUMENTS", help="of `zipserve up`, for a stack that is started")
    options.add_argument("--api-key", default="", metavar="KEY", help="sent with every request")
    options.add_argument("--model", default="", help="model id (default: the only or first one served)")
    options.add_argument("--arrivals", choices=schedule.PROCESSES, default="poisson", help="(default: poisson)")
    options.add_argument("--rate", type=above_0, default=1.0, metavar="R", help="requests per second (default: 1)")
    options.add_argument("--burstiness", type=above_0, default=2.0, metavar="CV", help="of gamma (default: 2)")
    options.add_argument("--trace", type=Path, metavar="FILE", help="arrivals from CSV or JSON lines instead")
    options.add_argument("--speed", type=above_0, default=1.0, metavar="X", help="plays the trace faster (default: 1)")
    options.add_argument("--requests", type=report.whole(1), metavar="N", help="(default: 100, quick: 8; or the trace)")
    options.add_argument("--warm-up", type=report.whole(0), default=4, metavar="N", help="requests before (default: 4)")
    options.add_argument("--seed", type=int, default=1, help="of arrivals, lengths and prompts (default: 1)")
    lengths = "N, uniform:LOW:HIGH, normal:MEAN:DEV or lognormal:MEDIAN:SIGMA"
    options.add_argument("--prompt-tokens", type=_length, default=Length("fixed", 128), metavar="L", help=lengths)
    options.add_argument("--output-tokens", type=_length, default=Length("fixed", 32), metavar="L", help="the same")
    options.add_argument("--text", type=Path, metavar="FILE", help="prompts are pieces of it (default: random ids)")
    options.add_argument("--vocab", type=report.whole(16), default=32_000, help="of random ids, if unknown")
    options.add_argument("--slo-ttft-ms", type=above_0, metavar="MS", help="objective: time to first token")
    options.add_argument("--slo-tpot-ms", type=above_0, metavar="MS", help="objective: time per token")
    options.add_argument("--slo-gap-ms", type=above_0, metavar="MS", help="objective: every gap between tokens")
    options.add_argument("--attain", type=float, default=0.9, metavar="SHARE", help="of requests that must keep them")
    options.add_argument("--timeout", type=above_0, default=600.0, metavar="S", help="of a request (default: 600)")
    options.add_argument("--plot", type=Path, metavar="PNG", help="draw the distributions")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    stack = nullcontext(None) if options.address or options.http else Stack(shlex.split(options.up))
    with stack as started:
        address = started.address if started is not None else options.address
        records = asyncio.run(_run(options, address))
    objective = Objective(*map(_seconds, (options.slo_ttft_ms, options.slo_tpot_ms, options.slo_gap_ms)))
    found = summary(records, objective)
    print(_table(found))
    if options.plot:
        rate = options.trace.name if options.trace else f"{options.arrivals}, {options.rate:g}/s"
        plot.save(options.plot, records, objective, f"{options.http or address}: {rate}, {len(records)} requests")
    decides = not options.quick
    checks = [
        Check("schedule lag p99 [ms]", found["lag_s"]["p99"] * 1e3, "<=", _LAG_MAX_S * 1e3, decides),
        Check("share of failed requests", sum(found["errors"].values()) / len(records), "<=", 0.0),
    ]
    if objective != Objective():
        checks.append(
            Check("share that keeps the objectives", found["goodput"]["share"], ">=", options.attain, decides)
        )
    device = report.cpu(1) + " (the client's)"
    return report.finish("serve", checks, device=device, as_json=options.json, **found)


@dataclass
class _Target:
    ask: Ask
    vocab_tokens: int
    text: list[int] | str
    """Of which prompts are pieces; empty: random ids."""


async def _run(options: argparse.Namespace, address: str) -> list[Record]:
    randomness = random.Random(options.seed)  # noqa: S311  the same load in every run
    if options.trace:
        due = schedule.read_trace(options.trace, options.speed)[: options.requests]
    else:
        count = options.requests or (8 if options.quick else 100)
        at = schedule.times(options.arrivals, options.rate, randomness, options.burstiness)
        due = schedule.drawn(count, at, options.prompt_tokens, options.output_tokens, randomness)
    if not due:
        raise InvalidRequestError(f"{options.trace} has no request", field="trace")
    before = list(itertools.islice(itertools.cycle(due), options.warm_up))
    async with AsyncExitStack() as resources:
        target = await (_http(options, resources) if options.http else _grpc(options, address, resources))
        sent = _prompts([*before, *due], target, randomness)
        for record in await warm_up(target.ask, before, sent[: len(before)]):
            if record.error:
                raise InvalidRequestError(f"a request before the start failed: {record.error}")
        report.progress(f"{len(due)} requests within {due[-1].at_s:.1f} s")
        return await drive(target.ask, due, sent[len(before) :])


async def _grpc(options: argparse.Namespace, address: str, resources: AsyncExitStack) -> _Target:
    client = await resources.enter_async_context(AsyncClient(address, api_key=options.api_key))
    model = await client.model(options.model)
    text: list[int] = []
    if options.text:
        text = await client.tokenize(options.text.read_text()[:_TOKENIZE_CHARS], model=model.id)
    return _Target(GrpcEndpoint(client, options.timeout).ask, model.vocab_tokens or options.vocab, text)


async def _http(options: argparse.Namespace, resources: AsyncExitStack) -> _Target:
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    client = await resources.enter_async_context(
        httpx.AsyncClient(
            base_url=options.http,
            headers=headers,
            timeout=options.timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
    )
    model = options.model or await find_model(client)
    return _Target(HttpEndpoint(client, model).ask, options.vocab, options.text.read_text() if options.text else "")


def _prompts(due: list[Arrival], target: _Target, randomness: random.Random) -> list[Prompt]:
    if isinstance(target.text, str) and target.text:
        chars = [ord(char) for char in target.text]
        longer = [Arrival(a.at_s, a.prompt_tokens * _CHARS_PER_TOKEN, a.output_tokens) for a in due]
        return ["".join(map(chr, piece)) for piece in schedule.prompts(longer, chars, 0, randomness)]
    ids = target.text if isinstance(target.text, list) else []
    return [*schedule.prompts(due, ids, target.vocab_tokens, randomness)]


def _table(found: dict[str, Any]) -> str:
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end to end", "lag_s": "schedule lag"}
    head = ("ms", *found["ttft_s"])
    rows = [(title, *(f"{value * 1e3:.1f}" for value in found[name].values())) for name, title in names.items()]
    good = found["goodput"]
    rates = (
        f"{found['requests_per_s']:.2f} requests/s, {found['prompt_tokens_per_s']:.0f} prompt and "
        f"{found['output_tokens_per_s']:.0f} output tokens/s"
    )
    lines = [
        report.table(head, rows),
        f"{found['requests']} requests in {found['seconds']:.1f} s: {rates}",
        f"goodput: {good['share']:.1%} keep the objectives, {good['requests_per_s']:.2f} requests/s",
        *(f"failed: {count} × {error}" for error, count in found["errors"].items()),
    ]
    return "\n".join(lines) + "\n"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _length(text: str) -> Length:
    try:
        return Length.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
