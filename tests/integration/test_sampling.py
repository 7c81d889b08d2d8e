"""Everything that sampling offers through a whole stack: right by transformers, and the same whatever dies."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from oracle import Oracle
from polling import until
from processes import Processes
from streams import Stub
from zipserve.common.rpc.channel import ChannelPool
from zipserve.v1.inference_service_pb2 import Finished, GenerateRequest, TokenIds
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import SamplingParams, StopConditions, TokenLogprobs

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [3 + (i * 31 + (i * i) // 5) % 250 for i in range(300)]
SEED = 40


@dataclass
class Choice:
    """One answer, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished = field(default_factory=Finished)


@dataclass
class Answers:
    """All that one request gave."""

    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)

    @property
    def token_ids(self) -> list[list[int]]:
        return [self.choices[i].token_ids for i in range(len(self.choices))]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(redis_url: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Processes]:
    logs = tmp_path_factory.mktemp("sampling")
    async with Processes(redis_url, tiny_model, logs, cluster="sampling") as processes:
        await processes.start("prefill-0", "decode-0", "router")
        yield processes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(stack: Processes) -> AsyncIterator[Stub]:
    async with ChannelPool(4 << 20) as channels:
        yield InferenceServiceStub(channels.get(stack.router))


async def generate(
    stub: Stub,
    tokens: int,
    n: int = 1,
    seed: int = SEED,
    on_tokens: Callable[[int], None] = lambda _: None,
    **sampling: float | dict[int, float],
) -> Answers:
    request = GenerateRequest(
        token_ids=TokenIds(ids=PROMPT),
        n=n,
        sampling=SamplingParams(**{"temperature": 1.5, "seed": seed, **sampling}),  # type: ignore[arg-type]
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
    )
    answers = Answers()
    async for response in stub.Generate(request, timeout=100):
        match response.WhichOneof("event"):
            case "prompt_logprobs":
                answers.prompt_logprobs += response.prompt_logprobs.logprobs
            case "delta":
                choice = answers.choices.setdefault(response.delta.choice, Choice())
                assert response.delta.index == len(choice.token_ids), "a token was lost or repeated"
                choice.token_ids += response.delta.token_ids
                choice.logprobs += response.delta.logprobs
                on_tokens(sum(len(of.token_ids) for of in answers.choices.values()))
            case "finished":
                answers.choices[response.finished.choice].finished = response.finished
    assert all(len(tokens_of) == tokens for tokens_of in answers.token_ids)
    return answers


def own(logprobs: list[TokenLogprobs]) -> torch.Tensor:
    return torch.tensor([of_token.logprob for of_token in logprobs])


async def test_logprobs_are_those_of_transformers(stub: Stub, tiny_model: Path) -> None:
    answers = await generate(stub, 30, n=2, logprobs=5, prompt_logprobs=3, repetition_penalty=1.2, min_p=0.02)
    oracle = Oracle(tiny_model)
    for choice in answers.choices.values():
        right = oracle.logits(PROMPT + choice.token_ids).log_softmax(-1)[:-1]
        following = torch.tensor([*PROMPT, *choice.token_ids][1:])
        expected = right.gather(1, following[:, None])[:, 0]
        found = own([*answers.prompt_logprobs, *choice.logprobs])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        tops = torch.tensor([list(of_token.top_logprobs) for of_token in choice.logprobs])
        torch.testing.assert_close(tops, right[len(PROMPT) - 1 :].topk(5).values, rtol=1e-3, atol=1e-3)


async def test_choices_are_single_requests_of_the_next_seeds(stub: Stub) -> None:
    alone = [(await generate(stub, 60, seed=SEED + i, top_p=0.95)).token_ids[0] for i in range(4)]
    together = await generate(stub, 60, n=4, top_p=0.95)
    assert together.token_ids == alone
    bytes_of_one = (await generate(stub, 2)).choices[0].finished.kv_transfer.bytes
    assert all(choice.finished.kv_transfer.bytes == bytes_of_one for choice in together.choices.values())


async def test_every_choice_survives_its_decode_worker(stack: Processes, stub: Stub) -> None:
    """The last test of this file: the worker is another one afterwards."""
    changes = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {7: 2.0}}
    expected = await generate(stub, 150, n=3, **changes)  # type: ignore[arg-type]
    seen = 0

    def count(tokens: int) -> None:
        nonlocal seen
        seen = tokens

    running = asyncio.create_task(generate(stub, 150, n=3, on_tokens=count, **changes))  # type: ignore[arg-type]
    await until(lambda: seen > 60, "every choice has tokens")
    stack.kill("decode-0")
    assert not running.done()
    await stack.start("decode-1")
    found = await running
    assert found.token_ids == expected.token_ids
    assert all(choice.finished.usage.replays >= 1 for choice in found.choices.values())
