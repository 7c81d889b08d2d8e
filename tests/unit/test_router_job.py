"""Validation: every limit, by name and value; and the transcript that a valid job fills."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import router_model
from zipserve.common.errors import InternalError, InvalidRequestError
from zipserve.common.sampling import Sampling
from zipserve.router.config import RouterSettings
from zipserve.router.detokenizer import Detokenizer
from zipserve.router.facts import ModelFacts
from zipserve.router.job import Job, check_prompt, check_prompt_logprobs, check_stop, completion_tokens
from zipserve.router.transcript import Transcript
from zipserve.v1.sampling_pb2 import FinishReason, StopConditions, TokenLogprobs

FACTS = ModelFacts(context_tokens=100, vocab_tokens=50, eos_token_ids=frozenset({2}))
SETTINGS = RouterSettings.model_validate(
    {"secret": "a secret of tests", "completion_tokens_default": 20, "completion_tokens_max": 80}
)
STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("prompt", "message", "field"),
    [
        ([], "the prompt is empty", "prompt"),
        ([1] * 100, "the prompt has 100 tokens; .* context of 100", "prompt"),
        ([1, 50], r"token_ids.ids\[1\] is 50, must lie below the vocabulary's size of 50", "token_ids.ids[1]"),
    ],
)
def test_prompt(prompt: list[int], message: str, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_prompt(prompt, FACTS)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("stop", "message", "field"),
    [
        (StopConditions(stop=["x"] * 17), "has 17 strings, at most 16", "stop.stop"),
        (StopConditions(stop=["x", ""]), r"stop.stop\[1\] has 0 characters, must have 1 to 256", "stop.stop[1]"),
        (StopConditions(stop=["é" * 257]), r"stop.stop\[0\] has 257 characters", "stop.stop[0]"),
        (StopConditions(stop_token_ids=[1] * 257), "has 257 ids, at most 256", "stop.stop_token_ids"),
        (StopConditions(stop_token_ids=[3, 50]), r"stop.stop_token_ids\[1\] is 50", "stop.stop_token_ids[1]"),
    ],
)
def test_stop_conditions(stop: StopConditions, message: str, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_stop(stop, FACTS, SETTINGS)
    assert caught.value.field == field


def test_the_largest_allowed_stop_conditions_pass() -> None:
    check_stop(StopConditions(stop=["é" * 256] * 16, stop_token_ids=[49] * 256), FACTS, SETTINGS)
    check_prompt([49] * 99, FACTS)


@pytest.mark.parametrize(
    ("asked", "prompt_tokens", "message"),
    [
        (0, 10, "stop.max_tokens is 0, must be 1 to 80"),
        (81, 10, "stop.max_tokens is 81, must be 1 to 80"),
        (31, 70, "prompt's 70 tokens and stop.max_tokens of 31 are 101 together; the model's context is 100"),
    ],
)
def test_max_tokens(asked: int, prompt_tokens: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        completion_tokens(StopConditions(max_tokens=asked), prompt_tokens, FACTS, SETTINGS)
    assert caught.value.field == "stop.max_tokens"


@pytest.mark.parametrize(
    ("stop", "prompt_tokens", "expected"),
    [
        (StopConditions(max_tokens=30), 70, 30),
        (StopConditions(max_tokens=80), 1, 80),
        (StopConditions(), 10, 20),
        (StopConditions(), 95, 5),
    ],
)
def test_max_tokens_that_fit(stop: StopConditions, prompt_tokens: int, expected: int) -> None:
    assert completion_tokens(stop, prompt_tokens, FACTS, SETTINGS) == expected


def test_facts_come_from_the_configuration(tmp_path: Path) -> None:
    folder = router_model.write(tmp_path / "m")
    assert ModelFacts.read(folder) == ModelFacts(512, 259, frozenset({2}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert ModelFacts.read(folder).eos_token_ids == {1, 2}
    (folder / "config.json").write_text('{"text_config": {"vocab_size": 7, "n_positions": 9, "eos_token_id": 3}}')
    assert ModelFacts.read(folder) == ModelFacts(9, 7, frozenset({1, 2}))
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match="lacks vocab_size"):
        ModelFacts.read(folder)


@pytest.mark.parametrize(("top", "tokens", "fits"), [(0, 1 << 18, True), (20, 12_484, False), (20, 12_483, True)])
def test_prompt_logprobs_fit_into_a_message(top: int, tokens: int, fits: bool) -> None:
    check_prompt_logprobs(tokens, Sampling())
    if fits:
        check_prompt_logprobs(tokens, Sampling(prompt_logprobs=top))
        return
    with pytest.raises(InvalidRequestError, match="of 20 for 12484 tokens are 262164 values, at most 262144") as caught:
        check_prompt_logprobs(tokens, Sampling(prompt_logprobs=top))
    assert caught.value.field == "sampling.prompt_logprobs"


def job(
    *, max_tokens: int = 10, stop: tuple[str, ...] = (), ids: frozenset[int] = frozenset({0}), min_tokens: int = 0
) -> Job:
    return Job("r", (1, 1, 1), Sampling(), max_tokens, stop, ids, min_tokens=min_tokens)


def transcript(of: Job) -> Transcript:
    return Transcript(of, Detokenizer(lambda ids: "".join(chr(i) for i in ids), ()))


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_a_stop_token_counts_but_has_no_text() -> None:
    output = transcript(job())
    chunk = output.append(3, [*codes("ab"), 0, *codes("c")])
    assert (chunk.index, chunk.token_ids, chunk.text, output.finish) == (0, (97, 98, 0), "ab", STOP)


def test_log_probabilities_go_with_their_tokens() -> None:
    of_four = [TokenLogprobs(logprob=-i) for i in range(4)]
    asking = replace(job(), sampling=Sampling(logprobs=0))
    chunk = transcript(asking).append(3, [*codes("ab"), 0, *codes("c")], of_four)
    assert chunk.logprobs == tuple(of_four[:3])
    for wrong, of in ((of_four[:3], asking), ([], asking), (of_four, job())):
        with pytest.raises(InternalError, match=f"log-probabilities of {len(wrong)} for 4 tokens"):
            transcript(of).append(3, codes("abcd"), wrong)


def test_length_is_cut_at_max_tokens() -> None:
    output = transcript(job(max_tokens=2))
    chunk = output.append(3, codes("abc"))
    assert (chunk.token_ids, chunk.text, output.finish, output.remaining) == ((97, 98), "ab", LENGTH, 0)


def test_a_stop_token_at_the_last_place_is_a_stop() -> None:
    output = transcript(job(max_tokens=2))
    output.append(3, [97, 0])
    assert output.finish == STOP


def test_a_stop_string_over_several_chunks() -> None:
    output = transcript(job(stop=("END",)))
    assert output.append(3, codes("aE")).text == "a"
    assert output.append(5, codes("N")).text == ""
    chunk = output.append(6, codes("Dz"))
    assert (chunk.index, chunk.token_ids, chunk.text) == (3, (68,), "")
    assert (output.finish, output.stop_string) == (STOP, "END")


def test_a_stop_string_is_not_searched_in_the_first_min_tokens() -> None:
    output = transcript(job(stop=("END",), min_tokens=4, max_tokens=20))
    assert output.append(3, codes("ENDEND")).text == "ENDEND"
    chunk = output.append(9, codes("xENDy"))
    assert (chunk.text, output.finish, output.stop_string) == ("x", STOP, "END")


def test_a_complete_text_is_a_stop_at_its_last_token() -> None:
    output = transcript(job(max_tokens=3, stop=("END",)))
    chunk = output.append(3, codes("aEN"), complete=True)
    assert (chunk.token_ids, chunk.text, chunk.ends, output.finish) == ((97, 69, 78), "aEN", True, STOP)
    cut = transcript(job(max_tokens=2))
    assert cut.append(3, codes("abc"), complete=True).ends
    assert cut.finish == LENGTH


def test_half_a_character_comes_out_at_the_end() -> None:
    tokenizer = router_model.byte_tokenizer()
    half = tokenizer.encode("aé").ids[:2]
    output = Transcript(job(max_tokens=2), Detokenizer(tokenizer.decode, ()))
    assert output.append(3, half[:1]).text == "a"
    assert output.append(4, half[1:]).text == "\ufffd"


def test_held_text_comes_out_at_the_end() -> None:
    output = transcript(job(stop=("END",)))
    output.append(3, codes("aEN"))
    chunk = output.end(LENGTH)
    assert (chunk.index, chunk.token_ids, chunk.text, output.finish) == (3, (), "EN", LENGTH)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_tokens_at_another_position_are_refused(position: int) -> None:
    output = transcript(job())
    with pytest.raises(InternalError, match=f"from position {position} on, expected 3"):
        output.append(position, [97])
    assert output.token_ids == []


@given(st.lists(st.text("ENDx", min_size=1, max_size=4), max_size=8), st.integers(1, 20))
def test_pieces_make_no_difference(pieces: list[str], max_tokens: int) -> None:
    def run(parts: list[str]) -> tuple[list[int], str, object]:
        output = transcript(job(stop=("END",), max_tokens=max_tokens))
        text = ""
        for part in parts:
            if output.finish is None:
                text += output.append(output.position, codes(part)).text
        if output.finish is None:
            text += output.end(STOP).text
        return output.token_ids, text, output.finish

    assert run(pieces) == run(["".join(pieces)])
