"""The workloads: a prompt that another worker has computed, a chat of many turns, more prompts than memory holds."""

import asyncio
import json
import socket
import statistics
import tempfile
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from zipserve.bench import rows
from zipserve.bench.prefix.client import Answer, Client
from zipserve.bench.stack import Stack
from zipserve.common.errors import InternalError
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2 import ChatMessage
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub

T = TypeVar("T")
_MESSAGE_BYTES_MAX = 4 << 20
_SYSTEM = (
    "You help the visitors of a museum of science. Answer in at most three sentences, name a number where there is "
    "one, and say so when you are not sure. The museum has halls about light, heat, sound, electricity, magnets, "
    "gases, water, stones, plants, animals, the human body, machines, numbers, the moon, the planets and the stars. "
)
_QUESTIONS = (
    "Why is the sky blue in the day and red in the evening?",
    "And why does it turn dark at night, although there are so many stars?",
    "How hot is it inside of the sun, and how do we know that?",
    "Which planet would be the best one to visit, and how long would the journey take?",
    "What is the heaviest thing that was ever brought into space?",
    "Can sound travel through space? Please explain it to a child.",
    "How do magnets work, and do they lose their power with time?",
    "What should I look at first when I come to the museum with two children?",
)


@dataclass(frozen=True)
class Size:
    """How much is asked for."""

    prompt_tokens: int = 2000
    answer_tokens: int = 32
    rounds: int = 3
    turns: int = 8
    system_repeats: int = 8
    """Of a text of some 100 tokens, which is what a chat begins with."""
    chat_tokens: int = 96
    """Most tokens of an answer in it."""
    prompts: int = 16
    """Of the workload that memory does not hold, each of two blocks and a bit."""


QUICK = Size(prompt_tokens=300, answer_tokens=4, rounds=1, turns=3, system_repeats=2, chat_tokens=8, prompts=4)


@dataclass
class Elsewhere:
    """A prompt that another worker has computed before."""

    first: list[Answer] = field(default_factory=list)
    second: list[Answer] = field(default_factory=list)
    fetched_blocks: int = 0
    """By prefill workers from others, as they have logged it."""

    @property
    def share(self) -> float:
        """Median time to the first token of the second request, as a share of that of the first."""
        first, second = ([answer.first_token_s for answer in answers] for answers in (self.first, self.second))
        return statistics.median(second) / statistics.median(first)

    @property
    def agreement(self) -> float:
        """Share of generated tokens that are the same, up to the first that is not."""
        same = total = 0
        for one, other in zip(self.first, self.second, strict=True):
            pairs = list(zip(one.token_ids, other.token_ids, strict=False))
            total += max(len(one.token_ids), len(other.token_ids))
            same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        return same / total


def elsewhere(arguments: Sequence[str], vocab_tokens: int, size: Size) -> Elsewhere:
    """Sends each prompt twice to a stack of two prefill workers, where the second one goes to the other worker."""
    found = Elsewhere()
    # what is fetched costs nothing in the router's eyes, so that equal workers take turns
    turns = ["--prefill", "2", "--decode", "1", "--set", "router.fetch_cost=0", "--set", "prefill.log_level=debug"]
    with Stack([*turns, *arguments]) as stack:

        async def ask(client: Client) -> None:
            for i in range(size.rounds):
                prompt = rows.prompt(vocab_tokens, size.prompt_tokens, seed=i)
                found.first.append(await client.complete(prompt, size.answer_tokens))
                found.second.append(await client.complete(prompt, size.answer_tokens))

        _with_client(stack.address, ask)
        found.fetched_blocks = _fetched_blocks(stack)
    return found


def _fetched_blocks(stack: Stack) -> int:
    lines = [line for file in stack.log_dir.glob("prefill-*") for line in file.read_text().splitlines()]
    events = [json.loads(line) for line in lines if '"prefix.fetched"' in line]
    return sum(event["blocks"] for event in events)


def chat(arguments: Sequence[str], size: Size) -> list[Answer]:
    """One conversation, turn by turn, with a stack of two prefill workers."""
    answers: list[Answer] = []
    with Stack(["--prefill", "2", "--decode", "1", *arguments]) as stack:

        async def ask(client: Client) -> None:
            messages = [ChatMessage(role="system", content=_SYSTEM * size.system_repeats)]
            for turn in range(size.turns):
                messages.append(ChatMessage(role="user", content=_QUESTIONS[turn % len(_QUESTIONS)]))
                answers.append(await client.chat(messages, size.chat_tokens))
                messages.append(ChatMessage(role="assistant", content=answers[-1].text))

        _with_client(stack.address, ask)
    return answers


def hit_share(answers: Sequence[Answer], block_tokens: int) -> float:
    """Share of the full blocks of the prompts that were not computed."""
    full = sum(answer.prompt_tokens // block_tokens for answer in answers)
    return sum(answer.cached_tokens // block_tokens for answer in answers) / full


@dataclass
class Pressure:
    """More prompts than the store's memory holds, each asked for twice, and once more as another tenant."""

    first: list[Answer] = field(default_factory=list)
    again: list[Answer] = field(default_factory=list)
    recomputed: list[Answer] = field(default_factory=list)
    promoted_blocks: float = 0.0
    """Brought from disk into memory, as the store counts it."""

    @property
    def share(self) -> float:
        """Median time to the first token of what was found, as a share of what was computed in the same minute."""
        found, computed = ([answer.first_token_s for answer in answers] for answers in (self.again, self.recomputed))
        return statistics.median(found) / statistics.median(computed)


def pressure(
    arguments: Sequence[str], vocab_tokens: int, block_tokens: int, block_slab_bytes: int, size: Size
) -> Pressure:
    """A working set of four times the memory of the store; workers keep next to nothing."""
    blocks, found, port = 2 * size.prompts, Pressure(), _free_port()
    with tempfile.TemporaryDirectory(prefix="zipserve-bench-") as folder:
        settings = {
            "prefill.kv_blocks": 4,
            "decode.prefix_blocks_max": 0,
            "kvstore.memory_bytes": max(1, blocks // 4) * block_slab_bytes,
            "kvstore.disk_path": folder,
            "kvstore.metrics_port": port,
        }
        with Stack(
            [*arguments, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]
        ) as stack:

            async def ask(client: Client) -> None:
                prompts = [rows.prompt(vocab_tokens, 2 * block_tokens + 20, seed=i) for i in range(size.prompts)]
                await client.complete(prompts[0], 1, cache_salt="nobody")
                await _until_open(port)
                found.first = [await client.complete(prompt, 2) for prompt in prompts]
                for number, prompt in enumerate(prompts):
                    found.again.append(await client.complete(prompt, 2))
                    found.recomputed.append(await client.complete(prompt, 2, cache_salt=f"tenant {number}"))
                found.promoted_blocks = await asyncio.to_thread(_metric, port, "zipserve_kv_blocks_promoted_total")

            _with_client(stack.address, ask)
    return found


def _with_client(address: str, ask: Callable[[Client], Awaitable[T]]) -> T:
    async def run() -> T:
        async with ChannelPool(_MESSAGE_BYTES_MAX) as channels:
            return await ask(Client(InferenceServiceStub(channels.get(address))))

    return asyncio.run(run())


async def _until_open(port: int) -> None:
    """Returns when the store has fetched something: it learns from the first worker what a block is.

    Raises:
        InternalError: it has not in a minute.
    """
    for _ in range(600):
        if await asyncio.to_thread(_metric, port, "zipserve_kv_prefix_blocks_fetched_total"):
            return
        await asyncio.sleep(0.1)
    raise InternalError("the store has fetched nothing in a minute")


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
