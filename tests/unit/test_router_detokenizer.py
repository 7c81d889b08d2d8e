"""Text of a growing sequence: equal to decoding all of it, and never half a character on the way."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router_model import EOS, SPECIALS, byte_tokenizer, sentencepiece_tokenizer
from zipserve.common.models import default_folder
from zipserve.router.detokenizer import Detokenizer

BYTES = byte_tokenizer()
PIECES = sentencepiece_tokenizer(["▁hello", "▁wor", "ld", "▁café", "!", "s"])
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.text(st.sampled_from("ab é日本👩\u200d🚀🏳️क्षि\ufffd\n") | CHARACTERS, max_size=12)


def stream(tokenizer: Tokenizer, token_ids: list[int]) -> tuple[list[str], str]:
    """Deltas while tokens come, and what flushing adds."""
    detokenizer = Detokenizer(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True), frozenset(range(len(SPECIALS)))
    )
    return [detokenizer.push(token_id) for token_id in token_ids], detokenizer.flush()


def whole(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True)


@given(TEXT)
@example("👩‍👩‍👧‍👦 日本語 ok")
@example("\ufffd\ufffd\ufffd\ufffd\ufffd\ufffdé")
def test_bytes_of_a_text_come_back_whole(text: str) -> None:
    deltas, rest = stream(BYTES, BYTES.encode(text).ids)
    assert "".join(deltas) + rest == text
    # U+FFFD appears only where the text itself has it
    assert "".join(deltas).count("\ufffd") <= text.count("\ufffd")
    assert set(rest) <= {"\ufffd"}


@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=40))
@example([130] * 30)
@example([130] * 9 + BYTES.encode("👩é").ids)
def test_any_bytes_give_what_decoding_all_at_once_gives(token_ids: list[int]) -> None:
    deltas, rest = stream(BYTES, token_ids)
    assert "".join(deltas) + rest == whole(BYTES, token_ids)


@given(st.text(st.sampled_from("helowrdcaf é日👩!s"), max_size=20))
def test_sentencepiece_with_byte_fallback(text: str) -> None:
    token_ids = PIECES.encode(text).ids
    deltas, rest = stream(PIECES, token_ids)
    assert "".join(deltas) + rest == whole(PIECES, token_ids)
    assert "\ufffd" not in "".join(deltas)


def test_broken_bytes_are_not_held_for_ever() -> None:
    token = BYTES.encode("é").ids[-1]  # continues a character that never began
    assert whole(BYTES, [token]) == "\ufffd"
    detokenizer = Detokenizer(lambda ids: whole(BYTES, ids), ())
    shown = ""
    for count in range(1, 200):
        shown += detokenizer.push(token)
        assert len(detokenizer._window) <= 8
        assert count - len(shown) <= 3
    assert shown + detokenizer.flush() == "\ufffd" * 199


def test_special_tokens_have_no_text_and_do_not_eat_a_space() -> None:
    hello, world = PIECES.encode("hello").ids, PIECES.encode("world").ids
    deltas, rest = stream(PIECES, [*hello, EOS, *world])
    assert "".join(deltas) + rest == "hello world"


@pytest.mark.skipif(not default_folder().is_dir(), reason="the default model is not converted yet (make install)")
def test_the_default_model() -> None:
    tokenizer = Tokenizer.from_file(str(default_folder() / "tokenizer.json"))
    text = "Emoji 👩‍👩‍👧‍👦🏳️‍🌈, 日本語のテキスト, नमस्ते, Ünï¢ødé, a\u0301 and \t tabs\r\n" * 3
    token_ids = tokenizer.encode(text).ids
    deltas, rest = stream(tokenizer, token_ids)
    assert "".join(deltas) == text
    assert rest == ""
    assert not any("\ufffd" in delta for delta in deltas)
    assert max(len(delta) for delta in deltas) <= max(len(word) for word in re.split(r"(?=\s)", text))


def test_tokens_without_text_do_not_fill_the_window() -> None:
    detokenizer = Detokenizer(lambda ids: whole(BYTES, ids), ())
    assert [detokenizer.push(10_000) for _ in range(200)] == [""] * 200
    assert len(detokenizer._window) <= 64
    assert detokenizer.push(BYTES.encode("a").ids[0]) == "a"
