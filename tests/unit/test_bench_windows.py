"""Texts, windows and look-ups of `zipserve bench quality`."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from zipserve.bench.quality import texts
from zipserve.bench.quality.retrieval import THINGS, lookups
from zipserve.bench.quality.windows import Encode, Shape, Window, retrieval_window, text_windows
from zipserve.common.errors import InvalidRequestError

SHAPE = Shape(context_tokens=40, scored_tokens=10, queries=3)


def byte_encoder() -> Encode:
    """One token per byte."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.encode


def word_encoder() -> tuple[Encode, dict[int, str]]:
    """Words and single digits, without their spaces."""
    words = ["The", "code", "of", "the", "is", ".", "<unk>", *"0123456789", *THINGS]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return tokenizer.encode, {i: word for word, i in vocabulary.items()}


def test_shipped_texts() -> None:
    found = texts.load([texts.shipped()])
    assert {"play", "prose", "glossary", "code"} == set(found)
    for genre, text in found.items():
        assert 60_000 < len(text.encode()) <= 100_000, genre
    readme = (texts.shipped() / "README.md").read_text()
    assert all(f"`{genre}.txt`" in readme for genre in found), "a text without its source and licence"


def test_texts_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("plain, déjà vu")
    (tmp_path / "folder/ignored.md").write_text("not a text")
    records = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / "tales.jsonl").write_text('{"text": "once"}\n\n{"text": "twice"}\n')
    assert texts.load([tmp_path / "folder", tmp_path / "sums.jsonl", tmp_path / "tales.jsonl"]) == {
        "a": "plain, déjà vu",
        "sums": "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 2 + 2?\nAnswer: 4\n",
        "tales": "once\n\ntwice\n",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("binary.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"question": "x"}', "a.jsonl:1 has neither"),
        ("a.jsonl", b"[1]", "a.jsonl:1 has neither"),
    ],
)
def test_texts_that_are_none(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequestError, match=message):
        texts.load([tmp_path / name])


def test_folder_without_texts_and_genres_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"has no \*\.txt"):
        texts.load([tmp_path])
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "a.jsonl").write_text('{"text": "2"}')
    with pytest.raises(InvalidRequestError, match=r"a\.jsonl is named 'a', which is taken"):
        texts.load([tmp_path])
    with pytest.raises(InvalidRequestError, match=r"a\.txt is named 'a', which is taken"):
        texts.load([tmp_path / "a.txt"], reserved={"a"})


def test_window() -> None:
    window = Window("a", list(range(10)), 6)
    assert (window.scored, window.targets) == ([6, 7, 8], [7, 8, 9])


def test_text_windows_do_not_overlap() -> None:
    windows = text_windows("a", list(range(51 * 4)), SHAPE, 1, 3)
    assert [window.token_ids[0] for window in windows] == [51, 102, 153]
    for window in windows:
        assert window.token_ids == list(range(window.token_ids[0], window.token_ids[0] + 51))
        assert (window.genre, window.context_tokens, len(window.scored), len(window.targets)) == ("a", 40, 10, 10)
    with pytest.raises(InvalidRequestError, match="'a' has 3 windows of 51 tokens; 4 are needed"):
        text_windows("a", list(range(51 * 4 - 1)), SHAPE, 1, 3)


def test_lookups_are_drawn_by_seed_and_number() -> None:
    one = lookups(3, 5)
    assert one.codes == lookups(3, 5).codes
    assert lookups(3, 6).codes != one.codes
    assert lookups(4, 5).codes != one.codes
    assert len(one.codes) == len(THINGS) == len(set(THINGS))
    assert all(re.fullmatch("[0-9]{4}", code) for code in one.codes.values())
    assert one.queried(10, 12) == lookups(3, 5).queried(10, 12)
    assert set(one.queried(len(THINGS) - 2, 12)) == set(list(one.codes)[-2:])


@pytest.mark.parametrize("context_tokens", [60, 61, 64, 70, 71, 72])
def test_retrieval_window(context_tokens: int) -> None:
    """Every query asks for a record that is whole in the context, once, and `answers` are its four digits."""
    encode, words = word_encoder()
    shape = Shape(context_tokens, queries=4)
    window = retrieval_window(lookups(1, 2), encode, shape)
    assert retrieval_window(lookups(1, 2), encode, shape) == window
    assert retrieval_window(lookups(1, 3), encode, shape) != window
    sentences = re.compile(r"The code of the (\w+) is (\d \d \d \d) \.")
    known = dict(sentences.findall(" ".join(words[i] for i in window.token_ids[:context_tokens])))
    asked = sentences.findall(" ".join(words[i] for i in window.token_ids[context_tokens:]))
    assert len(known) == (context_tokens // 11)
    assert len(asked) == len({thing for thing, _ in asked}) == len(window.answers) == 4
    for (thing, code), rows in zip(asked, window.answers, strict=True):
        assert known[thing] == code
        assert " ".join(words[i] for i in window.targets[rows]) == code
    assert len(window.token_ids) == context_tokens + 4 * 11


def test_retrieval_window_of_bytes() -> None:
    encode = byte_encoder()
    window = retrieval_window(lookups(0, 0), encode, Shape(300, queries=2))
    letters = {encode(character).ids[0]: character for character in map(chr, range(32, 127))}
    text = "".join(letters[i] for i in window.token_ids)
    queries = re.findall(r"The code of the (\w+) is (\d{4})\.", text[300:])
    assert ["".join(letters[i] for i in window.targets[rows]) for rows in window.answers] == [c for _, c in queries]
    assert all(f"The code of the {thing} is {code}." in text[:300] for thing, code in queries)
    assert text[300:].startswith(" The code of")


def test_records_that_do_not_fill_the_context() -> None:
    encode, _ = word_encoder()
    with pytest.raises(InvalidRequestError, match="do not fill a context of 100000"):
        retrieval_window(lookups(0, 0), encode, Shape(100_000))
