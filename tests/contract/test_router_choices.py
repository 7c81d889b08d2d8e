"""Several choices of one prompt: one prefill and one pull for all of them, and every one right whatever fails."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from polling import until
from router_cluster import PROMPT, Cluster, build, refusal
from router_peers import Peer, logprobs_at, text_at, token_at
from zipserve.common.errors import OverloadedError, WorkerLostError
from zipserve.common.models import ModelFiles
from zipserve.v1.decode_service_pb2 import DecodeRequest
from zipserve.v1.inference_service_pb2 import Finished
from zipserve.v1.prefill_service_pb2 import PrefillRequest
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams, StopConditions, TokenLogprobs

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH
SEED = 100


@dataclass
class Choice:
    """One answer, put together."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished | None = None


async def choices(call: Any) -> list[Choice]:
    """Reads a call to its end, and checks that every choice has every token once and ends once."""
    found: dict[int, Choice] = {}
    async for response in call:
        if response.HasField("delta"):
            choice = found.setdefault(response.delta.choice, Choice())
            assert choice.finished is None
            assert response.delta.index == len(choice.token_ids)
            choice.token_ids += response.delta.token_ids
            choice.text += response.delta.text
            choice.logprobs += response.delta.logprobs
        elif response.HasField("finished"):
            assert found[response.finished.choice].finished is None
            found[response.finished.choice].finished = response.finished
    answers = [found[index] for index in range(len(found))]
    for answer in answers:
        assert answer.finished is not None
        assert answer.finished.usage.completion_tokens == len(answer.token_ids)
    return answers


def expected(choice: int, count: int) -> list[int]:
    return [token_at(10 + SEED + choice + i) for i in range(count)]


def reasons(answers: list[Choice]) -> list[int]:
    return [answer.finished.reason for answer in answers if answer.finished]


def prefills(peer: Peer) -> list[PrefillRequest]:
    return [request for request in peer.requests if isinstance(request, PrefillRequest)]


def decodes(peer: Peer) -> list[DecodeRequest]:
    return [request for request in peer.requests if isinstance(request, DecodeRequest)]


@pytest.fixture
async def alone(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> Cluster:
    return await build(stack, model, redis_url)


def generate(cluster: Cluster, n: int, max_tokens: int = 9, logprobs: int | None = None, **stop: Any) -> Any:
    return cluster.generate(
        n=n,
        sampling=SamplingParams(seed=SEED, logprobs=logprobs),
        stop=StopConditions(max_tokens=max_tokens, **stop),
    )


async def test_choices_share_a_prefill_and_a_decode(alone: Cluster) -> None:
    prefill, decode = await alone.add("p0", by_seed=True), await alone.add("d0", by_seed=True)
    answers = await choices(generate(alone, 4, logprobs=1))
    assert [answer.token_ids for answer in answers] == [expected(i, 9) for i in range(4)]
    assert [answer.text for answer in answers] == [text_at(10 + SEED + i, 9) for i in range(4)]
    assert all(answer.logprobs == [logprobs_at(10 + i, 1) for i in range(9)] for answer in answers)
    assert reasons(answers) == [LENGTH] * 4
    (asked,), (continued,) = prefills(prefill), decodes(decode)
    assert (asked.choices, asked.sampling.seed, continued.sampling.seed) == (4, SEED, SEED)
    assert [sibling.seed for sibling in continued.siblings] == [SEED + i for i in range(1, 4)]
    assert [sibling.token_id for sibling in continued.siblings] == [answer.token_ids[0] for answer in answers[1:]]
    for answer in answers:
        assert answer.finished is not None
        assert (answer.finished.kv_transfer.bytes, answer.finished.usage.replays) == (4096, 0)
    await alone.at_rest()


@pytest.mark.parametrize("fails_at", [11, 14, 18])
async def test_what_is_left_after_a_failure_is_replayed_one_by_one(alone: Cluster, fails_at: int) -> None:
    """The choice of index 1 has ended by then, but in the first case; the others go on behind their own tokens."""
    failed: list[object] = []

    async def fail_once(position: object) -> None:
        if position == fails_at and not failed:
            failed.append(position)
            raise WorkerLostError("a fault of a test")

    end_at = 10 + SEED + 1 + 2  # the third token of choice 1, the fourth of choice 0, the second of choice 2
    prefill = await alone.add("p0", by_seed=True, end_at=end_at)
    decode = await alone.add("d0", by_seed=True, end_at=end_at, at_token=fail_once)
    answers = await choices(generate(alone, 5))
    for i, answer in enumerate(answers):
        length = {0: 4, 1: 3, 2: 2, 3: 1, 4: 9}[i]
        assert answer.token_ids[:-1] == expected(i, length)[:-1]
        assert reasons([answer]) == [STOP if i < 4 else LENGTH]
    replayed = [i for i, answer in enumerate(answers) if answer.finished and answer.finished.usage.replays]
    assert replayed == {11: [0, 1, 2, 4], 14: [4], 18: [4]}[fails_at]
    again = prefills(prefill)[1:]
    assert sorted(request.sampling.seed - SEED for request in again) == replayed
    for request in again:
        own = answers[request.sampling.seed - SEED].token_ids
        assert list(request.token_ids) == [*PROMPT.ids, *own[: fails_at - 10]]
        assert (request.prompt_tokens, request.choices) == (10, 1)
    assert len(decodes(decode)[0].siblings) == 3
    assert not any(request.siblings for request in decodes(decode)[1:])
    await alone.at_rest()


async def test_a_failed_prefill_is_replayed_for_all(alone: Cluster) -> None:
    failed: list[object] = []

    async def fail_once(_: object) -> None:
        if not failed:
            failed.append(True)
            raise WorkerLostError("a fault of a test")

    prefill = await alone.add("p0", by_seed=True, before=fail_once)
    await alone.add("d0", by_seed=True)
    answers = await choices(generate(alone, 3))
    assert [answer.token_ids for answer in answers] == [expected(i, 9) for i in range(3)]
    assert [request.choices for request in prefills(prefill)] == [3, 3]


async def test_choices_that_have_no_room_together_are_decoded_one_by_one(alone: Cluster) -> None:
    async def refuse_many(request: object) -> None:
        if isinstance(request, DecodeRequest) and request.siblings:
            raise OverloadedError("more than the slots of this worker", retry_after_s=600)

    await alone.add("p0", by_seed=True)
    await alone.add("d0", by_seed=True, before=refuse_many)
    answers = await choices(generate(alone, 3))
    assert [answer.token_ids for answer in answers] == [expected(i, 9) for i in range(3)]
    assert [answer.finished.usage.replays for answer in answers if answer.finished] == [1, 1, 1]
    await alone.at_rest()


async def test_choices_that_end_with_their_first_token_are_not_decoded(alone: Cluster) -> None:
    prefill, decode = await alone.add("p0", by_seed=True, end_at=10 + SEED), await alone.add("d0", by_seed=True)
    answers = await choices(generate(alone, 2))
    assert (len(answers[0].token_ids), answers[1].token_ids) == (1, expected(1, 9))
    (continued,) = decodes(decode)
    assert (continued.sampling.seed, len(continued.siblings)) == (SEED + 1, 0)
    assert prefill.released == []
    answers = await choices(generate(alone, 3, max_tokens=1))
    assert [len(answer.token_ids) for answer in answers] == [1, 1, 1]
    assert len(decodes(decode)) == 1
    await until(lambda: len(prefill.released) == 1, "the handle that nobody takes is given up")


async def test_a_stop_string_ends_its_choice_only(alone: Cluster) -> None:
    """And the worker is told, once; but not where the call ends with it."""
    await alone.add("p0", by_seed=True)
    decode = await alone.add("d0", by_seed=True)
    answers = await choices(generate(alone, 3, max_tokens=6, stop=[text_at(10 + SEED + 5, 2)]))
    assert reasons(answers) == [LENGTH, STOP, STOP]
    assert [answer.text for answer in answers] == [text_at(10 + SEED, 6), text_at(11 + SEED, 4), text_at(12 + SEED, 3)]
    await alone.at_rest()
    (continued,) = decodes(decode)
    assert [(ended.stream_id, ended.sequence) for ended in decode.ended] == [(continued.stream_id, 2)]
    assert len(continued.stream_id) == 16


async def test_a_cancelled_request_cancels_all(alone: Cluster) -> None:
    await alone.add("p0", by_seed=True)
    decode = await alone.add("d0", by_seed=True)
    call = generate(alone, 4, max_tokens=400)
    for _ in range(12):
        await call.read()
    call.cancel()
    await decode.cancelled.wait()
    await alone.at_rest()


async def test_too_many_choices(alone: Cluster) -> None:
    refused = await refusal(alone.generate(n=17))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "n")
    assert refused.message == "n is 17, must be 1 to 16"


async def test_every_choice_counts_against_the_limit(stack: AsyncExitStack, model: ModelFiles, redis_url: str) -> None:
    cluster = await build(stack, model, redis_url, queue_tokens_max=100)
    refused = await refusal(generate(cluster, 4, max_tokens=23))
    assert refused.message == "prompt and max_tokens are 102 tokens, this router admits at most 100"


async def test_without_prefill_workers_every_choice_is_computed_alone(
    stack: AsyncExitStack, model: ModelFiles, redis_url: str
) -> None:
    """The prompt's log-probabilities are asked for once all the same."""
    cluster = await build(stack, model, redis_url, local_prefill_tokens_max=-1)
    decode = await cluster.add("d0", by_seed=True)
    sampling = SamplingParams(seed=SEED, prompt_logprobs=1)
    answers = await choices(cluster.generate(n=3, sampling=sampling, stop=StopConditions(max_tokens=9)))
    assert [answer.token_ids for answer in answers] == [expected(i, 9) for i in range(3)]
    asked = decodes(decode)
    assert sorted(request.sampling.seed for request in asked) == [SEED, SEED + 1, SEED + 2]
    assert [r.sampling.HasField("prompt_logprobs") for r in asked] == [r.sampling.seed == SEED for r in asked]
    assert not any(request.siblings for request in asked)
    await cluster.at_rest()
