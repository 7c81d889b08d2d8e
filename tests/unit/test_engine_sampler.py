"""What a sampler does to logits before it draws: against the definitions, written out."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import InternalError, InvalidRequestError
from zipserve.common.guide import Guide
from zipserve.common.guide_matcher import GuideTokenizer
from zipserve.common.sampling import LOGIT_BIAS_ENTRIES_MAX, Sampling
from zipserve.engine.sampling import Drawn, Sampler, draw, sample

VOCAB = 12
GREEDY = Sampling(temperature=0.0)
ids = st.lists(st.integers(0, VOCAB - 1), max_size=20)
rows = st.lists(st.sampled_from([-8.0, -1.5, -0.25, 0.0, 0.5, 2.0, 7.0]), min_size=VOCAB, max_size=VOCAB)
params = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.25, 4.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.5]),
    frequency_penalty=st.sampled_from([-0.25, 0.0, 1.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 3.0, 100.0])).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
)


def adjusted(
    logits: list[float], p: Sampling, prompt: list[int], generated: list[int], min_tokens: int, stops: set[int]
) -> list[float]:
    """The definition, token by token, in float64."""
    result = []
    for token, raw in enumerate(logits):
        logit = raw
        if token in prompt or token in generated:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        logit -= p.frequency_penalty * generated.count(token)
        logit -= p.presence_penalty * (token in generated)
        logit += dict(p.logit_bias).get(token, 0.0)
        if token in stops and len(generated) < min_tokens:
            logit = -math.inf
        result.append(logit)
    return result


@given(rows, params, ids.filter(bool), ids, st.integers(0, 12), st.sets(st.integers(0, VOCAB - 1), max_size=5))
def test_logits_are_adjusted_by_definition(
    logits: list[float], p: Sampling, prompt: list[int], generated: list[int], min_tokens: int, stops: set[int]
) -> None:
    """The logits used here are exact in binary, and so is every sum of them but those under the penalty of 1.25."""
    past, position = [*prompt, *generated], len(prompt) + len(generated)
    sampler = Sampler(p, past, prompt_tokens=len(prompt), min_tokens=min_tokens, stop_token_ids=stops)
    raw = np.array(logits, np.float32)
    found = sampler._adjusted(raw, position)
    expected = adjusted(logits, p, prompt, generated, min_tokens, stops)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(raw, np.array(logits, np.float32), "the model's logits are not the sampler's")
    plain = replace(p, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=())
    assert sampler.draw(raw, position) == Sampler(plain).draw(found, position)


@given(params, ids.filter(bool), st.integers(0, 40), st.integers(0, 40))
def test_a_replay_draws_the_same(p: Sampling, prompt: list[int], cut: int, min_tokens: int) -> None:
    """A sampler that has seen every token draws what one draws that is told of them at some later point."""
    logits = torch.randn((40, VOCAB), generator=torch.Generator().manual_seed(1)) * 3
    options = {"prompt_tokens": len(prompt), "min_tokens": min_tokens, "stop_token_ids": [0, 3]}
    whole, past = Sampler(p, prompt, **options), list(prompt)  # type: ignore[arg-type]
    replayed = whole
    for i in range(40):
        if i == cut:
            replayed = Sampler(p, list(past), **options)  # type: ignore[arg-type]
        position = len(prompt) + i
        token = sample(logits[i : i + 1], [whole], [position])[0]
        if i >= cut:
            # in another batch, too
            others = [Sampler(Sampling(seed=9)), replayed, Sampler(GREEDY)]
            assert sample(logits[[0, i, 3]], others, [5, position, 5])[1] == token
            replayed.append(token)
        whole.append(token)
        past.append(token)
        assert i >= min_tokens or token not in {0, 3}


def test_many_generated_tokens_are_counted() -> None:
    p = Sampling(temperature=0.0, frequency_penalty=1.0)
    sampler = Sampler(p, [0], prompt_tokens=1)
    logits = np.zeros(1000, np.float32)
    tokens = []
    for position in range(1, 2001):
        tokens.append(sampler.draw(logits, position))
        sampler.append(tokens[-1])
    assert tokens == [*range(1000), *range(1000)], "each time the token that was drawn least often"


def test_when_only_stop_ids_are_possible_one_is_drawn() -> None:
    sampler = Sampler(GREEDY, prompt_tokens=1, min_tokens=5, stop_token_ids=[0, 1])
    assert sampler.draw(np.array([-np.inf, 3.0, -np.inf], np.float32), 1) == 1


def test_stop_ids_outside_of_the_vocabulary_are_no_matter() -> None:
    sampler = Sampler(GREEDY, prompt_tokens=1, min_tokens=5, stop_token_ids=[1, 2**32 - 1])
    assert sampler.draw(np.array([1.0, 3.0, 0.0], np.float32), 1) == 0


@pytest.mark.parametrize(
    ("p", "past", "options"),
    [
        (Sampling(frequency_penalty=1.0), [1, 2], {}),
        (Sampling(frequency_penalty=1.0), [1, 2], {"prompt_tokens": 3}),
        (GREEDY, [], {"min_tokens": 1}),
    ],
)
def test_the_prompts_end_must_be_known(p: Sampling, past: list[int], options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Sampler(p, past, **options)  # type: ignore[arg-type]
    assert caught.value.field == "prompt_tokens"


@pytest.mark.parametrize("field", ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [-2.5, 17.0, math.nan, math.inf])
def test_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=rf"sampling\.{field} is {value}, must be between") as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{field}"


def test_a_bias_out_of_range() -> None:
    with pytest.raises(InvalidRequestError, match=r"logit_bias\[3\] is 100.5, must be between -100 and 100"):
        Sampling(logit_bias=((3, 100.5),))
    with pytest.raises(InvalidRequestError, match="has 1025 entries, at most 1024"):
        Sampling(logit_bias=tuple((i, 0.0) for i in range(LOGIT_BIAS_ENTRIES_MAX + 1)))
    with pytest.raises(InvalidRequestError, match="has token id 12, must lie below the vocabulary's size of 12"):
        Sampling(logit_bias=((12, 1.0),)).check_ids(12)


@given(params)
def test_the_message_says_all(p: Sampling) -> None:
    assert Sampling.from_proto(p.to_proto()) == replace(p, min_p=float(np.float32(p.min_p)))


EOS = 2


@pytest.fixture(scope="module")
def guides(tiny_model: Path) -> GuideTokenizer:
    return GuideTokenizer.load(tiny_model, 260, [EOS])


def guided(
    guides: GuideTokenizer, regex: str, p: Sampling, min_tokens: int = 0, stops: tuple[int, ...] = (EOS,)
) -> Sampler:
    matcher = guides.matcher(Guide("regex", (regex,)))
    return Sampler(p, [5], prompt_tokens=1, min_tokens=min_tokens, stop_token_ids=stops, guide=matcher)


@given(st.integers(0, 1 << 20), st.sampled_from([0.0, 1.0, 50.0]), st.sampled_from([0.0, 0.5]), st.integers(0, 3))
def test_only_what_a_guide_allows_is_drawn(
    guides: GuideTokenizer, seed: int, temperature: float, min_p: float, min_tokens: int
) -> None:
    """Of few likely tokens that the guide does not allow, at any temperature and after any penalty, nothing is left."""
    p = Sampling(temperature, min_p=min_p, seed=seed, repetition_penalty=4.0, logit_bias=((7, 100.0), (EOS, 100.0)))
    sampler, drawn = guided(guides, "[ab]{2}c?", p, min_tokens), list[int]()
    logits = torch.randn((4, 260), generator=torch.Generator().manual_seed(seed)) * 8
    for position in range(1, 5):
        (outcome,) = draw(logits[position - 1 : position], [sampler], [position])
        assert isinstance(outcome, Drawn)
        drawn.append(outcome.token_id)
        assert outcome.complete == sampler.ended
        if sampler.ended or drawn[-1] == EOS:
            break
    letters = [chr(ord("!") + token - 3) for token in drawn if token != EOS]
    assert re.fullmatch("[ab]{2}c?", "".join(letters))
    assert sampler.ended
    assert EOS not in drawn or min_tokens < 3, "an end is put off while something else may follow"


def test_an_end_that_does_not_end_is_drawn_only_where_nothing_else_may_follow(guides: GuideTokenizer) -> None:
    logits = torch.zeros((1, 260))
    logits[0, EOS] = 50.0
    for stops, count in (((EOS,), 2), ((), 9)):
        sampler, tokens = guided(guides, "a{1,9}", GREEDY, stops=stops), list[int]()
        while not sampler.ended:
            (outcome,) = draw(logits, [sampler], [1 + len(tokens)])
            assert isinstance(outcome, Drawn)
            tokens.append(outcome.token_id)
        assert len(tokens) == count


def test_a_guide_that_fails_leaves_the_other_rows_alone(guides: GuideTokenizer) -> None:
    logits = torch.randn((3, 260), generator=torch.Generator().manual_seed(0))
    matcher = guides.matcher(Guide("grammar", ("start: <|im_start|>",)))
    samplers = [Sampler(Sampling(logprobs=1)), Sampler(Sampling(logprobs=1), [5], prompt_tokens=1, guide=matcher)]
    outcomes = draw(logits, [*samplers, Sampler(Sampling())], [1, 1, 1])
    assert [type(outcome) for outcome in outcomes] == [Drawn, InvalidRequestError, Drawn]
    (alone,) = draw(logits[:1], [Sampler(Sampling(logprobs=1))], [1])
    assert outcomes[0] == alone


def test_a_model_that_rules_out_all_that_is_allowed(guides: GuideTokenizer) -> None:
    logits = torch.full((1, 260), -math.inf)
    logits[0, 200] = 0.0
    (outcome,) = draw(logits, [guided(guides, "a", GREEDY)], [1])
    assert isinstance(outcome, InternalError)
