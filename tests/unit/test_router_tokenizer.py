"""Prompts to ids: text, chat template, and what both refuse."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import router_model
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import default_folder
from zipserve.router.token_bytes import TokenBytes
from zipserve.router.tokenizer import PromptTokenizer
from zipserve.v1.inference_service_pb2 import ChatMessage, ChatPrompt, ToolCall


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return PromptTokenizer.load(router_model.write(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("model") / "tools"
    return PromptTokenizer.load(router_model.write(folder, chat_template=router_model.TOOLS_TEMPLATE))


def chat(*messages: ChatMessage, **fields: Any) -> ChatPrompt:
    return ChatPrompt(messages=messages, **fields)


async def test_text(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.decode(await tokenizer.encode_text("héllo")) == "héllo"
    assert await tokenizer.encode_text("") == []


async def test_long_text_leaves_the_event_loop_free(tokenizer: PromptTokenizer) -> None:
    text = "long words, " * 20_000
    task = asyncio.create_task(tokenizer.encode_text(text))
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10
    assert tokenizer.decode(await task) == text


async def test_chat(tokenizer: PromptTokenizer) -> None:
    ids = await tokenizer.encode_chat(
        chat(ChatMessage(role="system", content="S"), ChatMessage(role="user", content="U"))
    )
    assert ids == [1, *await tokenizer.encode_text("system:S"), 2, 1, *await tokenizer.encode_text("user:U"), 2, 1] + (
        await tokenizer.encode_text("assistant:")
    )


@pytest.mark.parametrize(
    ("messages", "message", "field"),
    [
        ([], "needs at least one", "chat.messages"),
        ([("tool", "x")], "template refuses the messages: unknown role tool", "chat.messages"),
        ([("user", "x"), ("", "x")], r"chat.messages\[1\].role is ''", "chat.messages[1].role"),
        ([("us er", "x")], r"chat.messages\[0\].role is 'us er'", "chat.messages[0].role"),
    ],
)
async def test_chat_refused(
    tokenizer: PromptTokenizer, messages: list[tuple[str, str]], message: str, field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        await tokenizer.encode_chat(chat(*(ChatMessage(role=role, content=content) for role, content in messages)))
    assert caught.value.field == field


def test_whether_a_template_knows_tools(
    tokenizer: PromptTokenizer, with_tools: PromptTokenizer, tmp_path: Path
) -> None:
    assert (tokenizer.chat, tokenizer.tools, tokenizer.hermes) == (True, False, False)
    assert (with_tools.chat, with_tools.tools, with_tools.hermes) == (True, True, True)
    template = "{% for t in tools or [] %}[TOOL]{{ t | tojson }}{% endfor %}{{ messages[0].content }}"
    other = PromptTokenizer.load(router_model.write(tmp_path / "other", chat_template=template))
    assert (other.tools, other.hermes) == (True, False)
    mentions = PromptTokenizer.load(router_model.write(tmp_path / "mentions", chat_template="{# tools #}x"))
    assert not mentions.tools


async def test_what_a_template_is_told(with_tools: PromptTokenizer) -> None:
    call = ToolCall(id="1", name="weather", arguments='{"city": "Bern"}')
    messages = [
        ChatMessage(role="user", content="u", name="ann"),
        ChatMessage(role="assistant", tool_calls=[call]),
        ChatMessage(role="tool", content="warm", tool_call_id="1"),
        ChatMessage(role="assistant", content="It is"),
    ]
    tool = '{"type": "function", "function": {"name": "weather"}}'
    ids = await with_tools.encode_chat(
        chat(*messages, tools=[tool], template_arguments={"shout": "true"}, continue_final_message=True)
    )
    assert with_tools.decode(ids) == (
        f"system:call with <tool_call>{tool}user(ann):uassistant:<tool_call>weather=Bern</tool_call>"
        "tool[1]:warmassistant:It is"
    )
    ids = await with_tools.encode_chat(chat(messages[0], template_arguments={"add_generation_prompt": "false"}))
    assert with_tools.decode(ids) == "user(ann):u"


USER = ChatMessage(role="user", content="x")


@pytest.mark.parametrize(
    ("prompt", "message", "field"),
    [
        (chat(USER, tools=["{"]), r"chat.tools\[0\] is '{', must be JSON", "chat.tools[0]"),
        (chat(USER, tools=["[]"]), "must be a JSON object", "chat.tools[0]"),
        (chat(USER, continue_final_message=True), "role 'user', must be of 'assistant'", "chat.continue_final_message"),
        (chat(USER, template_arguments={"shout": "x"}), "is 'x', must be JSON", "chat.template_arguments[shout]"),
        (
            chat(USER, template_arguments={"chat_template": '"x"'}),
            "not an argument",
            "chat.template_arguments[chat_template]",
        ),
        (chat(USER, template_arguments={"eos_token": '"x"'}), "not an argument", "chat.template_arguments[eos_token]"),
        (chat(USER, template_arguments={f"a{i}": "1" for i in range(65)}), "65 entries", "chat.template_arguments"),
        (
            chat(ChatMessage(role="user", tool_calls=[ToolCall(name="f")])),
            "tool_calls is set, but the role is 'user'",
            "chat.messages[0].tool_calls",
        ),
        (
            chat(ChatMessage(role="user", tool_call_id="1")),
            "tool_call_id is '1', but the role is 'user'",
            "chat.messages[0].tool_call_id",
        ),
        (
            chat(ChatMessage(role="assistant", tool_calls=[ToolCall(name="f", arguments="3")])),
            "is '3', must be a JSON object",
            "chat.messages[0].tool_calls[0].arguments",
        ),
    ],
)
async def test_what_is_refused_of_tools_and_arguments(
    with_tools: PromptTokenizer, prompt: ChatPrompt, message: str, field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        await with_tools.encode_chat(prompt)
    assert caught.value.field == field


async def test_tools_without_a_template_that_knows_them(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="has 1 tools; this model's chat template knows none"):
        await tokenizer.encode_chat(chat(USER, tools=["{}"]))


@given(st.text())
def test_bytes_of_tokens_of_bytes(text: str) -> None:
    backend = router_model.byte_tokenizer()
    bytes_of = TokenBytes(backend)
    assert b"".join(map(bytes_of, backend.encode(text, add_special_tokens=False).ids)) == text.encode()


def test_bytes_of_pieces() -> None:
    backend = router_model.sentencepiece_tokenizer(["▁hello", "▁wor", "ld"])
    bytes_of = TokenBytes(backend)
    assert b"".join(map(bytes_of, backend.encode("hello world é").ids)) == " hello world é".encode()
    assert (bytes_of(1), bytes_of(10_000)) == (b"<s>", b"")


async def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.load(router_model.write(tmp_path / "plain", chat_template=None))
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        await tokenizer.encode_chat(chat(ChatMessage(role="user", content="x")))


@pytest.mark.parametrize(("told", "torch"), [("TokenizersBackend", "without"), ("GPT2Tokenizer", "with")])
def test_a_plain_tokenizer_needs_no_torch(tmp_path: Path, told: str, torch: str) -> None:
    folder = router_model.write(tmp_path / "model")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": told}))
    script = (
        "import pathlib, sys; from zipserve.router.tokenizer import PromptTokenizer; "
        f"tokenizer = PromptTokenizer.load(pathlib.Path({str(folder)!r})); "
        "print(tokenizer.decode([5, 6, 7]), 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-P", "-c", script], check=True, capture_output=True, text=True).stdout
    expected = PromptTokenizer.load(folder).decode([5, 6, 7])
    assert answer.rstrip("\n") == f"{expected} {torch == 'with'}"


@pytest.mark.skipif(not default_folder().is_dir(), reason="the default model is not converted yet (make install)")
async def test_the_default_model() -> None:
    tokenizer = PromptTokenizer.load(default_folder())
    ids = await tokenizer.encode_chat(chat(ChatMessage(role="user", content="Hi")))
    assert ids[0] == 1  # <|im_start|>, as one token
    assert tokenizer.decode(ids).endswith("user\nHi\nassistant\n")
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.push(i) for i in ids) + detokenizer.flush() == tokenizer.decode(ids)
