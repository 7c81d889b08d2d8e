"""Calls of tools in an answer's text, in whatever pieces it comes."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zipserve.router.http.tool_calls import Arguments, Called, Said, ToolCallParser


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call's name and arguments."""
    parser, text, calls = ToolCallParser(), "", list[tuple[str, str]]()
    for told in [*(piece for fed in pieces for piece in parser.feed(fed)), *parser.flush()]:
        match told:
            case Said():
                text += told.text
            case Called():
                assert told.index == len(calls)
                calls.append((told.name, ""))
            case Arguments():
                name, so_far = calls[told.index]
                calls[told.index] = (name, so_far + told.text)
    assert parser.calls == len(calls)
    return text, calls


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}{\\"]"]}}\n</tool_call>'
ARGUMENTS = '{"a": [1, "}{\\"]"]}'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("no call", "no call", []),
        ("white space \n", "white space \n", []),
        (CALL, "", [("f", ARGUMENTS)]),
        (f"Well.\n\n{CALL}\n{CALL}\n", "Well.", [("f", ARGUMENTS)] * 2),
        (f"{CALL} and more", " and more", [("f", ARGUMENTS)]),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
        ("<tool_call>never closed", "<tool_call>never closed", []),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a":1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "f"}', "", [("f", "{}")]),
    ],
)
def test_texts(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert read([text]) == (said, calls)
    assert read(list(text)) == (said, calls)


PARTS = st.sampled_from(
    [CALL, "<tool_call>", "</tool_call>", "<tool", "text ", " \n", "{", "}", '"', "\\", '{"name": "g", "arguments": {']
)


@given(st.lists(PARTS, max_size=8).map("".join), st.data())
@example(f"x\n{CALL}", None)
def test_cuts_make_no_difference(text: str, data: st.DataObject | None) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)))) if data is not None else range(len(text))
    edges = sorted({0, len(text), *cuts})
    assert read([text[a:b] for a, b in pairwise(edges)]) == read([text])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_any_arguments_come_through(value: object) -> None:
    call = json.dumps({"name": "f", "arguments": {"value": value}})
    _, ((name, arguments),) = read([f"<tool_call>{call}</tool_call>"])
    assert (name, json.loads(arguments)) == ("f", {"value": value})
