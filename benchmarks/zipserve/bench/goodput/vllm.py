"""vLLM as a contestant: one instance, several in turns, or prefill and decode apart with its NIXL connector.

The client itself takes turns, and asks the prefill instance before the decode instance, so that no proxy costs
anything. The settings are those with which it is fastest on a CPU.
"""

import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from zipserve.bench.goodput.bars import RIVAL
from zipserve.bench.goodput.contestants import Connect
from zipserve.bench.goodput.vllm_instance import Instance
from zipserve.bench.serve.endpoints import Ask, HttpEndpoint, Prompt
from zipserve.bench.serve.records import Record
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import ModelFiles

_CHUNK_TOKENS = {"whole": 128, "replicas": 128, "apart": 512}
_COUNTED = {"return_token_ids": True}


@dataclass(frozen=True)
class Vllm:
    """An arrangement of vLLM's instances, each with cores of its own."""

    kind: str
    """Of _CHUNK_TOKENS."""
    chunk_tokens: int
    """Most tokens of a step."""
    python: Path
    files: ModelFiles
    sequences: int
    """Most at once, of an instance."""
    timeout_s: float
    """Of a request."""

    @classmethod
    def parse(cls, text: str, python: Path, files: ModelFiles, sequences: int, timeout_s: float) -> "Vllm":
        """From `KIND` or `KIND:CHUNK_TOKENS`.

        Raises:
            InvalidRequestError: it is neither.
        """
        kind, colon, chunk = text.partition(":")
        if kind not in _CHUNK_TOKENS or (colon and not chunk.isdecimal()):
            known = ", ".join(_CHUNK_TOKENS)
            raise InvalidRequestError(f"{text!r} is none of {known}, nor NAME:TOKENS", field="rival-arrangements")
        return cls(kind, int(chunk) if colon else _CHUNK_TOKENS[kind], python, files, sequences, timeout_s)

    @property
    def name(self) -> str:
        """See Contestant."""
        return f"{RIVAL}{self.kind} {self.chunk_tokens}"

    @property
    def devices(self) -> int:
        """See Contestant."""
        return sum(map(len, self._cores()))

    @property
    def instances(self) -> int:
        """See Contestant."""
        return len(self._cores())

    @contextmanager
    def served(self) -> Iterator[Connect]:
        """See Contestant."""
        apart = self.kind == "apart"
        with ExitStack() as stack:
            # One after the other: the first compiles for all.
            instances = [
                stack.enter_context(
                    Instance(
                        self.python,
                        self.files,
                        own,
                        chunk_tokens=self.chunk_tokens,
                        sequences=self.sequences,
                        transfers=apart,
                    )
                )
                for own in self._cores()
            ]

            @asynccontextmanager
            async def connect() -> AsyncIterator[Ask]:
                async with AsyncExitStack() as resources:
                    clients = [
                        await resources.enter_async_context(_client(instance.url, self.timeout_s))
                        for instance in instances
                    ]
                    endpoints = [HttpEndpoint(client, str(self.files.folder), _COUNTED) for client in clients]
                    yield Handover(clients[0], *endpoints).ask if apart else Turns(endpoints).ask

            yield connect

    def _cores(self) -> list[list[int]]:
        """Of each instance."""
        available = sorted(os.sched_getaffinity(0))
        match self.kind:
            case "whole":
                return [available]
            case "apart" if len(available) < 2:
                raise InvalidRequestError(f"{self.name} needs 2 cores, 1 is there", field="rival-arrangements")
            case "apart":
                return [[core] for core in available[:2]]
            case _:
                return [[core] for core in available]


class Turns:
    """Instances that take turns."""

    def __init__(self, endpoints: Sequence[HttpEndpoint]) -> None:
        self._endpoints = endpoints
        self._asked = 0

    async def ask(self, prompt: Prompt, output_tokens: int, record: Record) -> None:
        """See `Ask`."""
        self._asked += 1
        await self._endpoints[self._asked % len(self._endpoints)].ask(prompt, output_tokens, record)


class Handover:
    """What a proxy before prefill and decode does: the first computes the prompt, and tells where its KV is; the second
    fetches it, and answers."""

    def __init__(self, client: httpx.AsyncClient, prefill: HttpEndpoint, decode: HttpEndpoint) -> None:
        """
        Args:
            client: that of `prefill`.
        """
        self._client = client
        self._prefill = prefill
        self._decode = decode

    async def ask(self, prompt: Prompt, output_tokens: int, record: Record) -> None:
        """See `Ask`."""
        record.sent_s = time.perf_counter()
        body = {
            "model": self._prefill.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
        }
        try:
            answer = (await self._client.post("/v1/completions", json=body)).raise_for_status().json()
            where = answer["kv_transfer_params"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            record.error = f"{type(error).__name__} of prefill"
            record.ended_s = time.perf_counter()
            return
        await self._decode.stream(prompt, output_tokens, record, kv_transfer_params=where)


def _client(url: str, timeout_s: float) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits)
