"""Guided outputs through a router and real workers: what was asked for, also when a worker fails on the way."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inprocess import SECRET, running
from memory_transport import Fabric
from oracle import Oracle
from polling import until
from streams import Stub
from workers import Decode, Pair, Workers, prompt
from zipserve.common import errors
from zipserve.common.rpc.status import client_errors
from zipserve.router.config import RouterSettings
from zipserve.router.service import RouterService
from zipserve.v1.inference_service_pb2 import Finished, GenerateRequest, TokenIds
from zipserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from zipserve.v1.sampling_pb2 import FinishReason, Guide, GuideChoices, SamplingParams, StopConditions, TokenLogprobs

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH
SCHEMA = Guide(
    json_schema=json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "tags": {"type": "array", "items": {"enum": ["red", "green", None]}, "maxItems": 3},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        }
    )
)
REGEX = Guide(regex=r"[A-Z][a-z]{3,20}, [0-9]{3}(-[0-9]{4})?")
CHOICES = Guide(choices=GuideChoices(texts=["yes", "yes please", "no"]))
BAD_LATER = Guide(grammar='start: "a" "b" <|im_start|>')
PROMPT = prompt(40)


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and len(value["name"]) <= 12
        and value["age"] in range(121)
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"red", "green", None}
    )


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished = field(default_factory=Finished)


@dataclass
class Stack:
    """A router over a real pair."""

    pair: Pair
    router: RouterService
    stub: Stub

    async def choices(
        self,
        guide: Guide | None,
        *,
        n: int = 1,
        max_tokens: int = 300,
        stop: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        request = GenerateRequest(
            token_ids=TokenIds(ids=PROMPT),
            guide=guide,
            n=n,
            sampling=SamplingParams(**{"temperature": 1.0, "seed": 5, **sampling}),
            stop=StopConditions(max_tokens=max_tokens, **(stop or {})),
        )
        answers = [Answer() for _ in range(n)]
        with client_errors():
            async for response in self.stub.Generate(request, timeout=60):
                match response.WhichOneof("event"):
                    case "delta":
                        answer = answers[response.delta.choice]
                        assert response.delta.index == len(answer.token_ids), "a token was lost or repeated"
                        answer.token_ids += response.delta.token_ids
                        answer.text += response.delta.text
                        answer.logprobs += response.delta.logprobs
                    case "finished":
                        answers[response.finished.choice].finished = response.finished
        return answers

    async def one(self, guide: Guide | None, **changes: Any) -> Answer:
        (answer,) = await self.choices(guide, **changes)
        return answer


@asynccontextmanager
async def started(workers: Workers, model: Path, redis_url: str, cluster: str, **settings: Any) -> AsyncIterator[Stack]:
    pair = await workers.pair(Fabric().open)
    values = {"model": str(model), "redis_url": redis_url, "cluster": cluster, "secret": SECRET, "heartbeat_s": 0.05}
    own = RouterSettings.model_validate({**values, **settings})
    router = RouterService(own)
    async with running(router, own) as address:
        yield Stack(pair, router, InferenceServiceStub(workers.channels.get(address)))
    await pair.settled()


@pytest.fixture
async def stack(cluster_workers: Workers, tiny_model: Path, redis_url: str, cluster: str) -> AsyncIterator[Stack]:
    async with started(cluster_workers, tiny_model, redis_url, cluster) as stack:
        yield stack


def fail_at(decode: Decode, *steps: int) -> None:
    """Lets every sequence fail in the device's steps of these numbers."""
    forward, count = decode.service.device.engine.forward, 0

    def failing(segments: Any) -> Any:
        nonlocal count
        count += 1
        step = forward(segments)
        ill = errors.UnavailableError("the device is ill")
        return replace(step, failed=dict.fromkeys(range(len(segments)), ill)) if count in steps else step

    decode.service.device.engine.forward = failing  # type: ignore[method-assign]


async def test_outputs_fit_a_schema(stack: Stack) -> None:
    answers = await asyncio.gather(*(stack.one(SCHEMA, seed=seed) for seed in range(8)))
    assert all(fits_schema(answer.text) for answer in answers)
    assert all(answer.finished.reason == STOP for answer in answers)
    assert len({answer.text for answer in answers}) > 1


async def test_outputs_are_the_same_where_decode_workers_compute_the_prompt(
    stack: Stack, cluster_workers: Workers, tiny_model: Path, redis_url: str, cluster: str
) -> None:
    expected = [await stack.one(SCHEMA, seed=seed) for seed in range(3)]
    values = {"model": str(tiny_model), "redis_url": redis_url, "cluster": cluster, "secret": SECRET}
    own = RouterSettings.model_validate({**values, "heartbeat_s": 0.05, "local_prefill_tokens_max": -1})
    router = RouterService(own)
    async with running(router, own) as address:
        local = Stack(stack.pair, router, InferenceServiceStub(cluster_workers.channels.get(address)))
        found = [await local.one(SCHEMA, seed=seed) for seed in range(3)]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert found[0].finished.kv_transfer.bytes == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
async def test_outputs_match_a_regular_expression(stack: Stack, temperature: float) -> None:
    for seed in range(4):
        answer = await stack.one(REGEX, seed=seed, temperature=temperature, top_p=0.9)
        assert re.fullmatch(REGEX.regex, answer.text)
        assert answer.finished.reason == STOP


async def test_outputs_are_one_of_the_choices(stack: Stack) -> None:
    answers = [await stack.one(CHOICES, seed=seed, temperature=3.0) for seed in range(10)]
    assert {answer.text for answer in answers} <= set(CHOICES.choices.texts)
    assert len({answer.text for answer in answers}) > 1
    assert all(answer.finished.reason == STOP for answer in answers)


async def test_one_token_completes_the_text(stack: Stack) -> None:
    """In prefill already: nothing is handed over then."""
    answers = await stack.choices(Guide(choices=GuideChoices(texts=["a", "b"])), n=3, temperature=5.0)
    assert all(answer.text in ("a", "b") and len(answer.token_ids) == 1 for answer in answers)
    assert all(answer.finished.reason == STOP for answer in answers)
    assert answers[0].finished.kv_transfer.bytes == 0


async def test_every_choice_of_a_prompt_follows_the_guide(stack: Stack) -> None:
    alone = [await stack.one(SCHEMA, seed=5 + i) for i in range(3)]
    together = await stack.choices(SCHEMA, n=3)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert all(fits_schema(answer.text) for answer in together)


async def test_others_in_the_batch_are_left_alone(stack: Stack) -> None:
    async def unguided(seed: int) -> list[int]:
        return (await stack.one(None, seed=seed, max_tokens=60, stop={"ignore_eos": True})).token_ids

    alone = [await unguided(seed) for seed in (1, 2)]
    mixed = await asyncio.gather(unguided(1), stack.one(SCHEMA), stack.one(REGEX), unguided(2))
    assert [mixed[0], mixed[3]] == alone
    assert fits_schema(mixed[1].text)
    assert re.fullmatch(REGEX.regex, mixed[2].text)


@pytest.mark.parametrize("steps", [(1,), (4,), (20, 21, 30)])
async def test_a_replay_goes_on_with_the_same_tokens(stack: Stack, steps: tuple[int, ...]) -> None:
    changes: dict[str, Any] = {"n": 2, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    expected = await stack.choices(SCHEMA, **changes)
    fail_at(stack.pair.decode, *steps)
    found = await stack.choices(SCHEMA, **changes)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert all(fits_schema(answer.text) for answer in found)
    assert sum(answer.finished.usage.replays for answer in found) >= 1


async def test_an_end_is_avoided_only_while_something_else_may_follow(stack: Stack) -> None:
    for stop in ({"ignore_eos": True}, {"min_tokens": 50}):
        texts = {(await stack.one(CHOICES, seed=seed, stop=stop)).text for seed in range(8)}
        assert texts <= {"yes please", "no"}
        assert "yes please" in texts
    forced = await stack.one(Guide(regex="(ab){3}"), stop={"min_tokens": 50})
    assert (forced.text, forced.finished.reason) == ("ababab", STOP)


async def test_other_ends_hold_as_ever(stack: Stack) -> None:
    short = await stack.one(Guide(regex="[ab]{30}"), max_tokens=7)
    assert (len(short.text), short.finished.reason) == (7, LENGTH)
    exact = await stack.one(Guide(regex="[ab]{7}"), max_tokens=7)
    assert (len(exact.text), exact.finished.reason) == (7, STOP)
    cut = await stack.one(Guide(regex="abc[de]{30}"), stop={"stop": ["c"]})
    assert (cut.text, cut.finished.reason) == ("ab", STOP)


async def test_logprobs_are_of_the_models_own_logits(stack: Stack, tiny_model: Path) -> None:
    answer = await stack.one(SCHEMA, logprobs=3)
    right = Oracle(tiny_model).logits(PROMPT + answer.token_ids)[len(PROMPT) - 1 : -1].log_softmax(-1)
    own = torch.tensor([of_token.logprob for of_token in answer.logprobs])
    expected = right.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    tops = torch.tensor([list(of_token.top_logprobs) for of_token in answer.logprobs])
    torch.testing.assert_close(tops, right.topk(3).values, rtol=1e-4, atol=1e-4)


async def test_a_guide_that_leads_nowhere_ends_its_sequence_only(stack: Stack) -> None:
    alone = (await stack.one(None, seed=1, max_tokens=60, stop={"ignore_eos": True})).token_ids
    beside = asyncio.create_task(stack.one(None, seed=1, max_tokens=60, stop={"ignore_eos": True}))
    with pytest.raises(errors.InvalidRequestError, match="after 2 tokens, allows only special tokens") as caught:
        await stack.one(BAD_LATER)
    assert caught.value.field == "guide.grammar"
    assert (await beside).token_ids == alone


@pytest.mark.parametrize(
    ("guide", "field", "words"),
    [
        (Guide(json_schema='{"type": "objec"}'), "guide.json_schema", "Invalid type: objec"),
        (Guide(json_schema='{"not": {}}'), "guide.json_schema", "not"),
        (Guide(regex="a("), "guide.regex", "unclosed group"),
        (Guide(grammar="start: foo"), "guide.grammar", 'unknown name: "foo"'),
        (Guide(choices=GuideChoices(texts=[""])), "guide.choices.texts[0]", "empty"),
        (Guide(json_object=False), "guide.json_object", "true"),
        (Guide(), "guide", "json_schema"),
    ],
)
async def test_a_guide_that_means_nothing_is_refused(stack: Stack, guide: Guide, field: str, words: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=re.escape(words)) as caught:
        await stack.one(guide)
    assert caught.value.field == field
    assert stack.router._frontend is not None
    await until(lambda: stack.router.load().running_requests == 0, "nothing is in flight")
    assert stack.pair.prefill.service.scheduler._arrivals == 0, "a worker was asked"


async def test_a_guide_that_takes_too_long(
    cluster_workers: Workers, tiny_model: Path, redis_url: str, cluster: str
) -> None:
    async with started(cluster_workers, tiny_model, redis_url, cluster, guide_compile_s=1e-4) as stack:
        with pytest.raises((errors.InvalidRequestError, errors.OverloadedError), match=r"0\.0001 s"):
            await stack.one(Guide(json_schema=json.dumps({"properties": {f"p{i}": {} for i in range(300)}})))


async def test_workers_check_for_themselves(stack: Stack) -> None:
    prefill, decode = stack.pair.prefill, stack.pair.decode
    with pytest.raises(errors.InvalidRequestError, match="unclosed group"):
        await prefill.compute(PROMPT, guide=Guide(regex="a("), prompt_tokens=40)
    with pytest.raises(errors.InvalidRequestError, match="prompt_tokens is 0 of 40"):
        await prefill.compute(PROMPT, guide=REGEX)
    first = await prefill.compute(PROMPT)
    border = {"prompt_tokens": 40, "past_token_ids": PROMPT}
    refused = await decode.refused(first, errors.InvalidRequestError, guide=Guide(regex="[^ -~]"), **border)
    assert "does not go on" in str(refused)
    one = await prefill.compute(PROMPT, guide=Guide(regex="a"), prompt_tokens=40)
    assert one.complete
    refused = await decode.refused(one, errors.InvalidRequestError, guide=Guide(regex="a"), **border)
    assert "complete after 1 tokens" in str(refused)
    for answer in (first, one):
        prefill.service.source.release_handle(answer.handle)
