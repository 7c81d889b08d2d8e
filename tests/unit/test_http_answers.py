"""Events of the domain as JSON: a stream and a whole answer say the same. And errors as OpenAI tells them."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from http_router import events_of
from zipserve.common import errors
from zipserve.common.sampling import Sampling
from zipserve.router.choice import Report
from zipserve.router.frontend import Event, Finished, Started
from zipserve.router.http import logprobs
from zipserve.router.http.answer import Head
from zipserve.router.http.chat_answer import ChatAnswer, ChatStream, ChatStyle
from zipserve.router.http.completion_answer import CompletionAnswer, CompletionStream, CompletionStyle
from zipserve.router.http.logprobs import CompletionLogprobs, Tokens
from zipserve.router.http.problem import problem_of
from zipserve.router.job import Job
from zipserve.router.transcript import Chunk
from zipserve.v1.sampling_pb2 import FinishReason, TokenLogprobs

HEAD = Head("id", 7, "tiny", "0123456789abcdef")
TOKENS = Tokens(lambda token_id: bytes([token_id]), frozenset())
JOB = Job("r", (1, 2), Sampling(), 9, (), frozenset([0]))


def run(choices: list[list[str]]) -> list[Event]:
    """Choices that take turns, each by pieces of text."""
    events: list[Event] = [Started(JOB, "tiny")]
    for turn in range(max(map(len, choices))):
        events += [Chunk(turn, (65,), c[turn], choice=i) for i, c in enumerate(choices) if turn < len(c)]
    for i, choice in enumerate(choices):
        stop = FinishReason.FINISH_REASON_STOP
        events.append(Finished(stop, 2, len(choice), 0.0, 0.0, Report(cached_tokens=1), choice=i))
    return events


TEXTS = st.lists(st.lists(st.text(), min_size=1, max_size=5), min_size=1, max_size=3)


@given(TEXTS, st.booleans())
def test_a_streamed_chat_is_the_whole_one(choices: list[list[str]], calls: bool) -> None:
    style = ChatStyle(usage=True, calls=calls)
    whole, stream = ChatAnswer(HEAD, TOKENS, style, lambda: "call"), ChatStream(HEAD, TOKENS, style, lambda: "call")
    body = b""
    for event in run(choices):
        whole.take(event)
        body += stream.take(event)
    *chunks, usage = events_of((body + stream.end()).decode())
    texts = [""] * len(choices)
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    answer: Any = whole.body()
    assert texts == [choice["message"]["content"] for choice in answer["choices"]] == ["".join(c) for c in choices]
    assert usage["usage"] == answer["usage"]
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": sum(map(len, choices)),
        "total_tokens": 2 + sum(map(len, choices)),
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@given(TEXTS)
def test_a_streamed_completion_is_the_whole_one(choices: list[list[str]]) -> None:
    style = CompletionStyle(n=len(choices), usage=True, echo=("<p>", "<q>"))
    whole, stream = CompletionAnswer(HEAD, TOKENS, style), CompletionStream(HEAD, TOKENS, style)
    body = b""
    for prompt in (0, 1):
        for event in run(choices):
            whole.take(prompt, event)
            body += stream.take(prompt, event)
    *chunks, usage = events_of((body + stream.end()).decode())
    texts = [""] * (2 * len(choices))
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    answer: Any = whole.body()
    expected = [echo + "".join(choice) for echo in ("<p>", "<q>") for choice in choices]
    assert texts == [choice["text"] for choice in answer["choices"]] == expected
    assert usage["usage"] == answer["usage"]
    assert answer["usage"]["prompt_tokens"] == 4


def test_texts_are_one_event_each_whatever_is_in_them() -> None:
    stream = ChatStream(HEAD, TOKENS, ChatStyle(), lambda: "")
    body = b"".join(stream.take(event) for event in run([["a", '\n\ndata: "x"', "\u2028é\x00"]]))
    texts = [event["choices"][0]["delta"].get("content") for event in events_of((body + stream.end()).decode())]
    assert texts == ["", "a", '\n\ndata: "x"', "\u2028é\x00", None]


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e9])
def test_probabilities_of_which_json_knows_nothing(value: float) -> None:
    at = TokenLogprobs(logprob=value, top_token_ids=[66], top_logprobs=[value])
    (entry,) = logprobs.of_chat(TOKENS, [65], [at])
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0
    told = CompletionLogprobs(TOKENS).add([65], [at])
    assert told["token_logprobs"] == [-9999.0]
    json.dumps([entry, told], allow_nan=False)


STATUSES = {
    "INVALID_REQUEST": 400, "UNAUTHENTICATED": 401, "MODEL_NOT_FOUND": 404, "OVERLOADED": 429, "DEADLINE_EXCEEDED": 504,
    "SLOW_READER": 429, "UNAVAILABLE": 503, "NO_WORKER": 503, "DRAINING": 503, "WORKER_LOST": 503,
}  # fmt: skip


@pytest.mark.parametrize("cls", errors.BY_REASON.values())
def test_every_error_has_a_status(cls: type[errors.ZipserveError]) -> None:
    problem = problem_of(cls("what happened"))
    expected = STATUSES.get(cls.reason)
    if expected is None:
        expected = next(
            (s for r, s in STATUSES.items() if r in errors.BY_REASON and issubclass(cls, errors.BY_REASON[r])), 500
        )
    assert problem.status == expected
    assert problem.body["error"] == {
        "message": "what happened", "type": problem.type, "param": problem.param, "code": problem.code,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "names", "param"),
    [
        ("sampling.top_p", {}, "top_p"),
        ("sampling.logit_bias[7]", {}, "logit_bias[7]"),
        ("stop.stop[3]", {}, "stop[3]"),
        ("stop.max_tokens", {"stop.max_tokens": "max_completion_tokens"}, "max_completion_tokens"),
        ("stop_token_ids[0]", {}, "stop_token_ids[0]"),
        ("stop[0]", {}, "stop[0]"),
        ("chat.messages[1].role", {}, "messages[1].role"),
        ("token_ids.ids[4]", {"token_ids.ids": "prompt[2]"}, "prompt[2][4]"),
        ("guide.regex", {"guide": "guided_regex", "guide.regex": "guided_regex"}, "guided_regex"),
    ],
)
def test_fields_are_called_what_the_client_calls_them(field: str, names: dict[str, str], param: str) -> None:
    problem = problem_of(errors.InvalidRequestError(f"{field} is wrong", field=field), names)
    assert (problem.param, problem.message) == (param, f"{param} is wrong")
