"""OpenAI's requests as the domain's: guides, tools, and what is the default.

What is refused: tests/contract/test_http_errors.py.
"""

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from zipserve.common.errors import InvalidRequestError
from zipserve.router.http.chat_request import ChatRequest
from zipserve.router.http.completion_request import CompletionRequest
from zipserve.router.http.fields import parse
from zipserve.v1.inference_service_pb2 import GenerateRequest
from zipserve.v1.sampling_pb2 import Guide, GuideChoices

MESSAGES = [{"role": "user", "content": "x"}]
SCHEMA = {"type": "object", "properties": {"ä": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
SCHEMA_TEXT = json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":"))
TOOLS = [
    {"type": "function", "function": {"name": "first", "description": 'a "tool"', "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "second"}},
]


def chat(**fields: Any) -> GenerateRequest:
    body = json.dumps({"messages": MESSAGES, **fields}).encode()
    return parse(ChatRequest, body).to_generate(tools_known=True)


def complete(**fields: Any) -> list[GenerateRequest]:
    body = json.dumps({"prompt": "x", **fields}).encode()
    return parse(CompletionRequest, body).to_generate(prompts_max=8)


def test_what_is_not_said_is_not_set() -> None:
    request = chat()
    assert request.chat.messages[0].content == "x"
    assert (request.model, request.n, request.priority, request.cache_salt) == ("", 1, 0, "")
    sampling = request.sampling
    for field in ("temperature", "top_p", "seed", "logprobs", "prompt_logprobs", "min_p", "repetition_penalty"):
        assert not sampling.HasField(field)
    assert not request.stop.HasField("max_tokens")
    assert not request.HasField("guide")


def test_null_is_as_good_as_nothing() -> None:
    names = set(ChatRequest.model_fields) - {"messages"}
    assert chat(**dict.fromkeys(names)) == chat()
    names = set(CompletionRequest.model_fields) - {"prompt"}
    assert complete(**dict.fromkeys(names)) == complete()


def test_labels_and_values_without_effect_are_accepted() -> None:
    plain = chat()
    assert chat(user="u", safety_identifier="s", prompt_cache_key="k", store=False, service_tier="auto") == plain
    assert chat(modalities=["text"], response_format={"type": "text"}) == plain
    assert complete(user="u", best_of=1, n=1) == complete()


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"response_format": {"type": "json_object"}}, Guide(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "strict": True, "schema": SCHEMA},
                }
            },
            Guide(json_schema=SCHEMA_TEXT),
        ),
        ({"guided_json": SCHEMA}, Guide(json_schema=SCHEMA_TEXT)),
        ({"guided_json": SCHEMA_TEXT}, Guide(json_schema=SCHEMA_TEXT)),
        ({"guided_regex": "[a-z]+"}, Guide(regex="[a-z]+")),
        ({"guided_choice": ["a", "b"]}, Guide(choices=GuideChoices(texts=["a", "b"]))),
        ({"guided_grammar": 'start: "a"'}, Guide(grammar='start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, Guide(json_schema=SCHEMA_TEXT)),
        ({"structured_outputs": {"regex": "a"}}, Guide(regex="a")),
        ({"structured_outputs": {"choice": ["a"]}}, Guide(choices=GuideChoices(texts=["a"]))),
        ({"structured_outputs": {"grammar": "g"}}, Guide(grammar="g")),
        ({"structured_outputs": {"json_object": True}}, Guide(json_object=True)),
    ],
)
def test_guides(fields: dict[str, Any], guide: Guide) -> None:
    assert chat(**fields).guide == guide
    assert complete(**fields)[0].guide == guide


def test_what_a_tool_is_told_as() -> None:
    first, second = chat(tools=TOOLS).chat.tools
    assert json.loads(first) == TOOLS[0]
    assert json.loads(second)["function"]["parameters"] == {"type": "object", "properties": {}}
    assert not chat(tools=TOOLS, tool_choice="none").chat.tools
    assert not chat(tools=TOOLS, tool_choice="auto").HasField("guide")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "first"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_must_be_made_is_a_grammar(choice: Any, parallel: bool) -> None:
    grammar = chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel).guide.grammar
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar)) == ""
    assert ('{\\"name\\": \\"second\\"' in grammar) == (choice == "required")
    assert ("call)*" in grammar) == (choice == "required" and parallel)


def test_one_call_of_the_models_own_choice_ends_the_answer() -> None:
    request = chat(tools=TOOLS, parallel_tool_calls=False, stop="x")
    assert list(request.stop.stop) == ["x", "</tool_call>"]
    assert not request.HasField("guide")


def test_a_format_and_tools_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError, match=r'response_format and tools are set.* tool_choice to "none"'):
        chat(tools=TOOLS, response_format={"type": "json_object"})
    assert chat(tools=TOOLS, tool_choice="none", response_format={"type": "json_object"}).guide.json_object


def test_prompts() -> None:
    assert [request.text for request in complete(prompt=["a", "b"])] == ["a", "b"]
    ids, text = complete(prompt=[[1, 2], "a"])
    assert (list(ids.token_ids.ids), text.text) == ([1, 2], "a")
    assert [list(request.token_ids.ids) for request in complete(prompt=[1, 2])] == [[1, 2]]


def test_an_echo_needs_the_prompts_probabilities() -> None:
    (request,) = complete(echo=True, logprobs=3)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs) == (3, 3)
    (request,) = complete(echo=True, logprobs=3, max_tokens=0)
    assert request.stop.max_tokens == 1
    (request,) = complete(echo=True)
    assert not request.sampling.HasField("prompt_logprobs")
