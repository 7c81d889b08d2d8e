"""What shares blocks dies while streams run: no request fails, every token is the one of an undisturbed run, and what
was sealed before is found again.
"""

import asyncio
import copy
import os
import signal
import socket
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from oracle import Oracle
from polling import until
from processes import Processes
from prompts import LICENCE, QUESTIONS
from streams import Streamed, Stub, collect, request
from zipserve.common import models
from zipserve.common.directory import DirectoryView
from zipserve.common.kv.holders import HolderKey, Holders
from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.common.registry import RegistryView
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.worker_service_pb2 import WorkerRole

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(300)]

STREAMS = 16
BLOCK = 128
PREFIX_TOKENS = 320
PREFIX_BLOCKS = PREFIX_TOKENS // BLOCK
"""Full blocks of every prompt."""
ASKED = 4
"""Prompts of each prefix."""
HEALED_S = 10.0
HITS = "zipserve_kv_prefix_blocks_total", "hit"


class Answers(Oracle):
    """The right answers; what prompts begin with is computed once, and no answer twice."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._prefixes: dict[tuple[int, ...], tuple[torch.Tensor, Any]] = {}
        self._right: dict[tuple[int, ...], list[int]] = {}

    def check(self, prompt: list[int], tokens: list[int]) -> None:
        """Asserts that every token is right."""
        right = self._right.get(tuple(prompt), [])
        if tokens != right[: len(tokens)]:
            assert self.first_wrong(prompt, tokens) is None, "a token is wrong"
            self._right[tuple(prompt)] = tokens

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        prefix, rest = tuple(token_ids[:PREFIX_TOKENS]), token_ids[PREFIX_TOKENS:]
        if prefix not in self._prefixes:
            output = self.model(torch.tensor([prefix]), use_cache=True)
            self._prefixes[prefix] = output.logits[0], output.past_key_values
        logits, cache = self._prefixes[prefix]
        more = self.model(torch.tensor([rest]), past_key_values=copy.deepcopy(cache))
        return torch.cat((logits, more.logits[0])).float()


@dataclass
class Cluster:
    """Two decode workers and one of everything else, and what the directory tells of them."""

    stack: Processes
    stub: Stub
    holders: Holders
    answers: Answers
    prompts: list[list[list[int]]]
    """Of each prefix; none has more full blocks than the prefix."""
    prefill_metrics_port: int

    def names(self, token_ids: Sequence[int]) -> list[bytes]:
        """Of the full blocks of a sequence."""
        layout = self.stack.workers(WorkerRole.WORKER_ROLE_PREFILL)[0].capabilities.writable_layout
        return prefix_hashes(token_ids[: len(token_ids) // BLOCK * BLOCK], BLOCK, chain_salt(layout, ""))

    def key(self, worker_id: str) -> HolderKey:
        """Of the life of a worker that the registry shows."""
        record = self.stack.view.find(worker_id)
        assert record is not None
        return worker_id, record.incarnation

    async def holds(self, worker_id: str, sequences: Sequence[Sequence[int]]) -> None:
        """Returns when a worker or the store is known to hold all full blocks of some sequences."""
        chains, key = [self.names(sequence) for sequence in sequences], self.key(worker_id)
        await until(
            lambda: all(self.holders.runs(names).get(key) == len(names) for names in chains),
            f"{worker_id} holds the blocks",
            timeout_s=20,
        )

    async def prefill_counts(self) -> dict[tuple[str, str], float]:
        """Counters of the prefill worker, by name and outcome."""
        url = f"http://127.0.0.1:{self.prefill_metrics_port}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())

        families = text_string_to_metric_families(await asyncio.to_thread(read))
        return {
            (sample.name, sample.labels["outcome"]): sample.value
            for family in families
            for sample in family.samples
            if "outcome" in sample.labels and sample.name.endswith("_total")
        }


class Streams:
    """Streams under way, one for each prompt."""

    def __init__(self, cluster: Cluster, prompts: list[list[int]], tokens: int) -> None:
        self._prompts = prompts
        self._cluster = cluster
        self._length = tokens
        self._counts = [0] * len(prompts)
        self._tasks = [asyncio.create_task(self._stream(i)) for i in range(len(prompts))]

    async def _stream(self, index: int) -> Streamed:
        def count(tokens: int) -> None:
            self._counts[index] = tokens

        message = request(self._prompts[index], self._length)
        return await collect(self._cluster.stub, message, timeout_s=150, on_tokens=count)

    async def under_way(self, at_least: int) -> None:
        """Waits until every stream has some tokens, and checks that none has finished."""
        await until(lambda: min(self._counts) >= at_least, f"every stream has {at_least} tokens", timeout_s=90)
        assert max(self._counts) < self._length, "the streams were too quick for this test"

    async def check(self) -> list[Streamed]:
        """Waits for all, and checks every token."""
        streamed = await asyncio.gather(*self._tasks)
        torch.set_num_threads(os.cpu_count() or 1)  # nobody else computes now
        for prompt, answer in zip(self._prompts, streamed, strict=True):
            assert len(answer.token_ids) == self._length
            await asyncio.to_thread(self._cluster.answers.check, prompt, answer.token_ids)
        return streamed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    model = models.resolve(models.DEFAULT_MODEL).folder
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    licence: list[int] = tokenizer(LICENCE.read_text(), add_special_tokens=False).input_ids
    questions: list[list[int]] = tokenizer(list(QUESTIONS[:ASKED]), add_special_tokens=False).input_ids
    prefixes = [licence[start : start + PREFIX_TOKENS] for start in range(0, 6 * 250, 250)]
    port, holders = free_port(), Holders()
    with tempfile.TemporaryDirectory() as disk:  # too large to be kept after the tests
        overrides = (
            ("kvstore", "disk_path", disk),
            ("kvstore", "disk_bytes", str(1 << 30)),
            ("prefill", "metrics_port", str(port)),
            ("prefill", "kv_blocks", "96"),
            ("decode", "kv_blocks", "96"),
        )
        async with (
            Processes(
                redis_url, model, tmp_path_factory.mktemp("kvstore"), cluster="chaos-kvstore", overrides=overrides
            ) as stack,
            DirectoryView(stack.settings, stack.view, holders),
            ChannelPool(4 << 20) as channels,
        ):
            await stack.start("kvstore-0", "prefill-0", "decode-0", "decode-1", "router")
            yield Cluster(
                stack,
                InferenceServiceStub(channels.get(stack.router)),
                holders,
                await asyncio.to_thread(Answers, model),
                [[prefix + question for question in questions] for prefix in prefixes],
                port,
            )


async def test_kill_decode_after_long_answers(cluster: Cluster) -> None:
    """The second prefill finds at the store what the dead worker has generated."""
    prompts, holders, depth = cluster.prompts[0], cluster.holders, PREFIX_BLOCKS + 2

    def answers_at_store() -> int:
        """Streams whose first two blocks with generated tokens are there."""
        return sum(len(holders.chain(name)) == depth for name in holders.names_of(cluster.key("kvstore-0")))

    streams = Streams(cluster, prompts, tokens=360)
    await streams.under_way(300)
    await until(lambda: answers_at_store() >= len(prompts), "the store has read what was generated")
    before = await cluster.prefill_counts()
    cluster.stack.kill("decode-0")
    answers = await streams.check()
    replays = sum(answer.finished.usage.replays for answer in answers)
    assert replays >= len(prompts) // 2
    after = await cluster.prefill_counts()
    found = after[HITS] - before[HITS]  # since the kill, nothing but replays was prefilled
    print(f"{replays} replays found {found:g} blocks, {replays * PREFIX_BLOCKS} of their prompts alone")  # noqa: T201
    assert found >= replays * depth


async def test_kill_store(cluster: Cluster) -> None:
    """While prompts need it; then its disk is served again."""
    stack = cluster.stack
    running, arriving, following, *late = cluster.prompts[1:]
    seeds = [running[0], arriving[0], following[0], *(prompts[0] for prompts in late)]
    await asyncio.gather(*(collect(cluster.stub, request(seed, 1)) for seed in seeds))  # no decode worker sees them
    await cluster.holds("kvstore-0", seeds)
    stack.signal("prefill-0", signal.SIGTERM)
    assert await stack.wait("prefill-0") == 0
    await stack.start("prefill-1")

    streams = [Streams(cluster, (running * STREAMS)[:STREAMS], tokens=128)]
    await streams[0].under_way(3)
    streams.append(Streams(cluster, arriving[:2], tokens=24))
    await asyncio.to_thread(stack.kill, "kvstore-0")  # while these arrive
    streams.append(Streams(cluster, following[:2], tokens=24))
    for some in streams:
        assert not any(answer.finished.usage.replays for answer in await some.check())
    counts = await cluster.prefill_counts()
    assert counts["zipserve_kv_prefix_fetches_total", "fetched"] >= 1
    assert counts["zipserve_kv_prefix_fetches_total", "failed"] >= 1, "nobody has asked the dead store"

    await stack.start("kvstore-0")
    await cluster.holds("kvstore-0", [prompts[0] for prompts in late])
    cached_tokens = 0
    for prompts in late:  # the worker may hear of the store a heartbeat later than we
        assert set(cluster.holders.runs(cluster.names(prompts[0]))) == {cluster.key("kvstore-0")}
        (answer,) = await Streams(cluster, prompts[:1], tokens=24).check()
        cached_tokens = answer.finished.usage.cached_prompt_tokens
        if cached_tokens:
            break
    assert cached_tokens == PREFIX_BLOCKS * BLOCK


async def test_redis_forgets_everything(cluster: Cluster, redis_url: str) -> None:
    """The directory is whole again soon, and goes on, for those who knew it before and for those who come."""
    stack = cluster.stack
    streams = Streams(cluster, (cluster.prompts[0] * STREAMS)[:STREAMS], tokens=128)
    await streams.under_way(3)
    holding = cluster.holders.holders
    await until(lambda: "kvstore-0" in dict(holding()), "the store holds something")
    before = {key: set(cluster.holders.names_of(key)) for key in holding()}
    assert len(before) >= 3
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.flushall()
    flushed_s = time.monotonic()
    arriving = Streams(cluster, cluster.prompts[0], tokens=24)
    holders = Holders()
    async with (
        RegistryView(stack.settings) as registry,  # of somebody who comes now, and knows nothing of what was before
        DirectoryView(stack.settings, registry, holders),
    ):
        await until(
            lambda: all(holders.names_of(key) >= names for key, names in before.items()),
            "all are in the directory again, with what they had",
            timeout_s=HEALED_S,
        )
        print(f"the directory was whole again after {time.monotonic() - flushed_s:.2f} s")  # noqa: T201
        answers = [*await streams.check(), *await arriving.check()]
        assert not any(answer.finished.usage.replays for answer in answers)
        sequence = cluster.prompts[0][0] + answers[0].token_ids
        for view in (holders, cluster.holders):
            await until(
                lambda view=view: PREFIX_BLOCKS + 1 in view.runs(cluster.names(sequence)).values(),  # type: ignore[misc]
                "what was generated since is in it as well",
            )
