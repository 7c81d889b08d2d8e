"""Prompts to ids: text, chat template, and what both refuse."""

import asyncio
from pathlib import Path

import pytest

import router_model
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import default_folder
from zipserve.router.tokenizer import PromptTokenizer
from zipserve.v1.inference_service_pb2 import ChatMessage


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return PromptTokenizer.load(router_model.write(tmp_path_factory.mktemp("model") / "tiny"))


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
    ids = await tokenizer.encode_chat([ChatMessage(role="system", content="S"), ChatMessage(role="user", content="U")])
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
        await tokenizer.encode_chat([ChatMessage(role=role, content=content) for role, content in messages])
    assert caught.value.field == field


async def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.load(router_model.write(tmp_path / "plain", chat_template=None))
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        await tokenizer.encode_chat([ChatMessage(role="user", content="x")])


@pytest.mark.skipif(not default_folder().is_dir(), reason="the default model is not converted yet (make install)")
async def test_the_default_model() -> None:
    tokenizer = PromptTokenizer.load(default_folder())
    ids = await tokenizer.encode_chat([ChatMessage(role="user", content="Hi")])
    assert ids[0] == 1  # <|im_start|>, as one token
    assert tokenizer.decode(ids).endswith("user\nHi\nassistant\n")
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.push(i) for i in ids) + detokenizer.flush() == tokenizer.decode(ids)
