"""A prefill and a decode worker with a real model, sampling by everything that a request can ask for."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_transport import Fabric
from oracle import NEAR_TIE_LOGIT, Oracle
from workers import Pair, Workers, prompt
from zipserve.common import errors
from zipserve.v1.sampling_pb2 import SamplingParams, TokenLogprobs

PROMPT = prompt(40)
PENALTIES = SamplingParams(
    temperature=0, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.75, logit_bias={5: 4.0, 6: -3.0}
)
STOP_IDS = [9, 40, 77]
BORDER = {"prompt_tokens": len(PROMPT), "min_tokens": 20, "stop_token_ids": STOP_IDS}


@pytest.fixture
async def pair(cluster_workers: Workers) -> Pair:
    return await cluster_workers.pair(Fabric().open)


async def generate(pair: Pair, past: list[int], new: int, sampling: SamplingParams, **border: Any) -> list[int]:
    """First token and the rest, after the tokens of `past`."""
    prefilled = await pair.prefill.compute(past, sampling=sampling, **border)
    rest = await pair.decode.tokens(prefilled, new - 1, sampling=sampling, past_token_ids=past, **border)
    return [prefilled.token_id, *rest]


def adjusted(logits: torch.Tensor, generated: list[int]) -> torch.Tensor:
    """The logits [vocab] after PENALTIES and BORDER, by definition."""
    seen = set(PROMPT) | set(generated)
    result = logits.clone()
    for token in range(len(logits)):
        if token in seen:
            result[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        result[token] -= 0.75 * generated.count(token) + 1.0 * (token in generated)
    result[5] += 4.0
    result[6] -= 3.0
    if len(generated) < 20:
        result[STOP_IDS] = -torch.inf
    return result


async def test_penalties_and_biases_are_those_of_the_definition(pair: Pair, tiny_model: Path) -> None:
    tokens = await generate(pair, PROMPT, 30, PENALTIES, **BORDER)
    logits = Oracle(tiny_model).logits(PROMPT + tokens)[len(PROMPT) - 1 :]
    for i, token in enumerate(tokens):
        right = adjusted(logits[i], tokens[:i])
        assert right.max() - right[token] <= NEAR_TIE_LOGIT, f"token {i}"
    assert any(int(logits[i].argmax()) != token for i, token in enumerate(tokens)), "nothing was changed"


@pytest.mark.parametrize("cut", [1, 7, 25])
async def test_a_replay_counts_the_same_tokens(pair: Pair, cut: int) -> None:
    """Of a request that is drawn at random: what was generated before the replay is not taken for prompt."""
    sampling = SamplingParams(temperature=2.0, min_p=0.05, seed=5, repetition_penalty=1.5, frequency_penalty=0.75)
    tokens = await generate(pair, PROMPT, 30, sampling, **BORDER)
    assert await generate(pair, PROMPT + tokens[:cut], 30 - cut, sampling, **BORDER) == tokens[cut:]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampling": SamplingParams(min_p=2)}, "sampling.min_p"),
        ({"sampling": SamplingParams(logit_bias={259: 1})}, "sampling.logit_bias[259]"),
        ({"sampling": SamplingParams(presence_penalty=1)}, "prompt_tokens"),
        ({"min_tokens": 1}, "prompt_tokens"),
    ],
)
async def test_a_worker_checks_for_itself(pair: Pair, changes: dict[str, Any], field: str) -> None:
    prefilled = await pair.prefill.compute(PROMPT)
    with pytest.raises(errors.InvalidRequestError) as caught:
        await pair.prefill.compute(PROMPT, **changes)
    assert caught.value.field == field
    refused = await pair.decode.refused(prefilled, errors.InvalidRequestError, **changes)
    assert getattr(refused, "field", "") == field
    pair.prefill.service.source.release_handle(prefilled.handle)


async def test_past_tokens_outside_of_the_vocabulary(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(PROMPT)
    refused = await pair.decode.refused(prefilled, errors.InvalidRequestError, past_token_ids=[1, 259])
    assert getattr(refused, "field", "") == "past_token_ids"
    pair.prefill.service.source.release_handle(prefilled.handle)


def close(found: Sequence[TokenLogprobs], logits: torch.Tensor, token_ids: list[int], top: int) -> None:
    """Compares with the log-softmax of a plain model's logits [n, vocab] at tokens [n]."""
    right = logits.log_softmax(-1)
    own = torch.tensor([of_token.logprob for of_token in found])
    torch.testing.assert_close(own, right.gather(1, torch.tensor(token_ids)[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    ids = torch.tensor([list(of_token.top_token_ids) for of_token in found], dtype=torch.int64).view(len(found), top)
    values = torch.tensor([list(of_token.top_logprobs) for of_token in found]).view(len(found), top)
    torch.testing.assert_close(values, right.topk(top).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, right.gather(1, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top", [0, 1, 20])
async def test_logprobs_are_those_of_transformers(pair: Pair, tiny_model: Path, top: int) -> None:
    """Of the model's own logits, whatever changes them before a token is drawn."""
    sampling = SamplingParams(temperature=3.0, top_p=0.9, seed=5, frequency_penalty=1, logit_bias={7: 5}, logprobs=top)
    border = {"prompt_tokens": len(PROMPT)}
    first = await pair.prefill.compute(PROMPT, sampling=sampling, **border)
    events = await pair.decode.events(first, 20, sampling=sampling, past_token_ids=PROMPT, **border)
    tokens = [first.token_id, *(token for event in events for token in event.tokens.token_ids)]
    found = [first.logprobs, *(of_token for event in events for of_token in event.tokens.logprobs)]
    logits = Oracle(tiny_model).logits(PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert len(found) == len(tokens) == 21
    close(found, logits, tokens, top)


@pytest.mark.parametrize(("top", "step_tokens"), [(0, 512), (20, 512), (3, 13), (3, 1)])
async def test_prompt_logprobs_are_those_of_transformers(
    cluster_workers: Workers, tiny_model: Path, top: int, step_tokens: int
) -> None:
    """In one step, in chunks of several steps, and beside prompts that ask for none."""
    prefill = await cluster_workers.prefill(Fabric().open, step_tokens=step_tokens)
    asking, plain = SamplingParams(temperature=0, prompt_logprobs=top), SamplingParams(temperature=0)
    lengths = [40, 1, 17, 100]
    answers = await asyncio.gather(
        *(prefill.compute(prompt(n, salt=n), sampling=asking if n != 17 else plain) for n in lengths)
    )
    oracle = Oracle(tiny_model)
    for tokens, answer in zip(lengths, answers, strict=True):
        prefill.service.source.release_handle(answer.handle)
        assert not answer.HasField("logprobs")
        assert len(answer.prompt_logprobs) == (tokens - 1 if tokens != 17 else 0)
        if answer.prompt_logprobs:
            close(
                answer.prompt_logprobs,
                oracle.logits(prompt(tokens, salt=tokens))[:-1],
                prompt(tokens, salt=tokens)[1:],
                top,
            )


async def test_sequences_of_a_step_may_ask_for_different_logprobs(pair: Pair, tiny_model: Path) -> None:
    async def one(salt: int, sampling: SamplingParams) -> tuple[list[int], list[TokenLogprobs]]:
        first = await pair.prefill.compute(prompt(20, salt))
        events = await pair.decode.events(first, 15, sampling=sampling)
        tokens = [first.token_id, *(token for event in events for token in event.tokens.token_ids)]
        return tokens, [of_token for event in events for of_token in event.tokens.logprobs]

    tops = [None, 2, 0, 5]
    answers = await asyncio.gather(*(one(i, SamplingParams(seed=i, logprobs=top)) for i, top in enumerate(tops)))
    oracle = Oracle(tiny_model)
    for i, (top, (tokens, found)) in enumerate(zip(tops, answers, strict=True)):
        if top is None:
            assert found == []
        else:
            close(found, oracle.logits(prompt(20, i) + tokens)[20:-1], tokens[1:], top)
