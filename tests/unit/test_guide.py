"""Guides: their limits, what they allow token by token, and that a sequence can be taken up anywhere."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from zipserve.common.errors import InvalidRequestError
from zipserve.common.guide import Guide
from zipserve.common.guide_matcher import GuideMatcher, GuideTokenizer
from zipserve.v1.inference_service_pb2 import GenerateRequest
from zipserve.v1.sampling_pb2 import Guide as GuideMessage
from zipserve.v1.sampling_pb2 import GuideChoices

EOS = 2
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
ALL = {
    "json_schema": Guide("json_schema", (PERSON,)),
    "json_object": Guide("json_object", ()),
    "regex": Guide("regex", (r"[0-9]{2}(-[a-c]+)?",)),
    "choices": Guide("choices", ("yes", "yes please", "no")),
    "grammar": Guide("grammar", ('start: "a" b\nb: "x" | "(" b ")"\n',)),
}


@pytest.fixture(scope="module")
def tokens(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> GuideTokenizer:
    """Three ids more than there are tokens, as models have that round their vocabulary up."""
    return GuideTokenizer.load(tiny_model, 262, [EOS])


def allowed(matcher: GuideMatcher) -> list[int]:
    return np.flatnonzero(matcher.allowed()).tolist()


def walk(matcher: GuideMatcher, seed: int, most: int) -> list[int]:
    """Tokens that are allowed, drawn at random, up to the end of the text."""
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    while not matcher.ended and len(drawn) < most:
        drawn.append(int(rng.choice(allowed(matcher))))
        matcher.advance(drawn[-1])
    return drawn


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (GuideMessage(), "guide"),
        (GuideMessage(json_object=False), "guide.json_object"),
        (GuideMessage(json_schema=""), "guide.json_schema"),
        (GuideMessage(json_schema=" " * (65 << 10)), "guide.json_schema"),
        (GuideMessage(regex="é" * (5 << 10)), "guide.regex"),
        (GuideMessage(grammar="a" * (33 << 10)), "guide.grammar"),
        (GuideMessage(choices=GuideChoices()), "guide.choices"),
        (GuideMessage(choices=GuideChoices(texts=["a"] * 257)), "guide.choices"),
        (GuideMessage(choices=GuideChoices(texts=["a", ""])), "guide.choices.texts[1]"),
        (GuideMessage(choices=GuideChoices(texts=["a" * 40_000, "b" * 40_000])), "guide.choices"),
    ],
)
def test_what_is_beyond_a_limit(message: GuideMessage, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Guide.from_proto(message)
    assert caught.value.field == field


@pytest.mark.parametrize("kind", ALL)
def test_there_and_back(kind: str) -> None:
    assert Guide.of(GenerateRequest(guide=ALL[kind].to_proto())) == ALL[kind]
    assert Guide.of(GenerateRequest()) is None


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide("regex", ("a(",)), "unclosed group"),
        (Guide("regex", ("(?=a)b",)), "look-around"),
        (Guide("regex", ("()",)), "no text but the empty one"),
        (Guide("regex", (r"[^\s\S]",)), "cannot be followed"),
        (Guide("json_schema", ('{"type": "objec"}',)), "Invalid type: objec"),
        (Guide("json_schema", ('{"type":',)), "EOF|expected"),
        (Guide("json_schema", ("[]",)), "object schema"),
        (Guide("json_schema", ('{"not": {"type": "string"}}',)), "not"),
        (Guide("json_schema", ('{"$ref": "http://127.0.0.1/x"}',)), "retriev"),
        (Guide("grammar", ("start: foo",)), 'unknown name: "foo"'),
        (Guide("grammar", ("start: <|im_start|>",)), "special tokens"),
        (Guide("json_schema", (json.dumps({"properties": {f"{i:x}": {} for i in range(5000)}}),)), "too big"),
    ],
)
def test_what_does_not_compile(tokenizer: GuideTokenizer, guide: Guide, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        tokenizer.check(guide)
    assert caught.value.field == guide.field
    assert len(caught.value.message) < 700


@pytest.mark.parametrize("kind", ALL)
def test_what_is_drawn_is_what_the_guide_says(tokenizer: GuideTokenizer, tokens: Tokenizer, kind: str) -> None:
    ends = 0
    for seed in range(30):
        tokenizer.check(ALL[kind])
        drawn = walk(tokenizer.matcher(ALL[kind]), seed, 400)
        assert max(drawn) < tokens.get_vocab_size()
        assert not set(drawn[:-1]) & {0, 1, EOS}, "special tokens"
        if len(drawn) == 400:
            continue
        ends += 1
        text = tokens.decode(drawn, skip_special_tokens=True)
        match kind:
            case "json_schema":
                value = json.loads(text)
                assert (list(value), value["age"] >= 0, len(value["name"]) <= 8) == (["name", "age"], True, True)
            case "json_object":
                assert isinstance(json.loads(text), dict)
            case "regex":
                assert re.fullmatch(r"[0-9]{2}(-[a-c]+)?", text)
            case "choices":
                assert text in ALL["choices"].source
            case _:
                assert re.fullmatch(r"a\(*x\)*", text)
    assert ends > 0


@pytest.mark.parametrize("kind", ALL)
def test_a_sequence_can_be_taken_up_anywhere(tokenizer: GuideTokenizer, kind: str) -> None:
    """Masks and ends after a replay are those of the first time."""
    prompt = [7, EOS, 1, 9]
    first, drawn = tokenizer.matcher(ALL[kind]), list[int]()
    rng = np.random.default_rng(1)
    while not first.ended and len(drawn) < 60:
        again = tokenizer.matcher(ALL[kind], prompt + drawn, len(prompt))
        assert allowed(again) == allowed(first)
        drawn.append(int(rng.choice(allowed(first))))
        first.advance(drawn[-1])
    if first.ended:
        with pytest.raises(InvalidRequestError, match="nothing to generate"):
            tokenizer.matcher(ALL[kind], prompt + drawn, len(prompt))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=60)
def test_every_choice_and_nothing_else_can_be_written(
    tokenizer: GuideTokenizer, tokens: Tokenizer, texts: list[str]
) -> None:
    guide = Guide("choices", tuple(texts))
    for text in texts:
        matcher = tokenizer.matcher(guide)
        for token_id in tokens.encode(text).ids:
            assert token_id in allowed(matcher)
            matcher.advance(token_id)
        assert matcher.ended or EOS in allowed(matcher)
    drawn = walk(tokenizer.matcher(guide), 0, 100)
    assert tokens.decode(drawn, skip_special_tokens=True) in texts


def test_it_ends_only_where_nothing_can_follow(tokenizer: GuideTokenizer, tokens: Tokenizer) -> None:
    matcher = tokenizer.matcher(ALL["choices"])
    for token_id in tokens.encode("yes").ids:
        assert EOS not in allowed(matcher)
        matcher.advance(token_id)
    assert not matcher.ended
    assert EOS in allowed(matcher)
    for token_id in tokens.encode(" please").ids:
        matcher.advance(token_id)
    assert matcher.ended


def test_a_token_that_does_not_follow(tokenizer: GuideTokenizer, tokens: Tokenizer) -> None:
    (letter,) = tokens.encode("q").ids
    with pytest.raises(InvalidRequestError, match=rf"after 0 tokens, does not go on with token id {letter}"):
        tokenizer.matcher(ALL["regex"], [5, letter], 1)
    for prompt_tokens in (0, 3):
        with pytest.raises(InvalidRequestError) as caught:
            tokenizer.matcher(ALL["regex"], [5, letter], prompt_tokens)
        assert caught.value.field == "prompt_tokens"


def test_looking_ahead_changes_nothing(tokenizer: GuideTokenizer) -> None:
    with ThreadPoolExecutor(1) as executor:
        plain, ahead = tokenizer.matcher(ALL["json_schema"]), tokenizer.matcher(ALL["json_schema"])
        for _ in range(20):
            ahead.look_ahead(executor)
            ahead.look_ahead(executor)
            expected = allowed(plain)
            assert allowed(ahead) == expected
            for matcher in (plain, ahead):
                matcher.advance(expected[-1])


def test_a_grammar_that_leads_to_a_special_token(tokenizer: GuideTokenizer, tokens: Tokenizer) -> None:
    matcher = tokenizer.matcher(Guide("grammar", ('start: "a" <|im_start|>',)))
    matcher.advance(tokens.encode("a").ids[0])
    with pytest.raises(InvalidRequestError, match="after 1 tokens, allows only special tokens"):
        matcher.allowed()


def test_spaces_end(tokenizer: GuideTokenizer, tokens: Tokenizer) -> None:
    """A model that loves them must come to something else."""
    matcher = tokenizer.matcher(ALL["json_object"])
    brace, space = tokens.encode("{ ").ids
    matcher.advance(brace)
    for _ in range(32):
        matcher.advance(space)
    assert space not in allowed(matcher)


def test_a_model_without_a_usable_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    for folder, vocab_tokens, eos in ((tmp_path, 262, [EOS]), (tiny_model, 20, [EOS]), (tiny_model, 262, [])):
        tokenizer = GuideTokenizer.load(folder, vocab_tokens, eos)
        with pytest.raises(InvalidRequestError, match="cannot be guided"):
            tokenizer.matcher(ALL["json_object"])
