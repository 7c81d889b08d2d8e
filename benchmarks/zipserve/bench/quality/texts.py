"""The texts that windows are cut from: those that ship, or the user's own."""

import json
from collections.abc import Container, Iterable
from pathlib import Path

from zipserve.common.errors import InvalidRequestError


def shipped() -> Path:
    """The folder of the public-domain texts: in the wheel beside the code, in a checkout in `benchmarks/data`."""
    package = Path(__file__).parents[1]
    packed = package / "data"
    return packed if packed.is_dir() else package.parents[1] / "data"


def load(paths: Iterable[Path], reserved: Container[str] = ()) -> dict[str, str]:
    """Reads texts.

    Args:
        paths: `.txt` files, a text each; `.jsonl` files, whose records are joined to one text; folders of such files.
        reserved: names that no text may have.

    Returns:
        text by genre, which is the file's name without its ending.

    Raises:
        InvalidRequestError: a path has no text, a record is of another form, or a name is taken.
    """
    texts: dict[str, str] = {}
    for path in paths:
        files = sorted(path.glob("*.txt")) + sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise InvalidRequestError(f"folder {path} has no *.txt and no *.jsonl files", field="texts")
        for file in files:
            if file.stem in texts or file.stem in reserved:
                raise InvalidRequestError(f"text {file} is named {file.stem!r}, which is taken", field="texts")
            texts[file.stem] = _read(file)
    return texts


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"text {file} cannot be read: {error}", field="texts") from error
    if file.suffix != ".jsonl":
        return text
    lines = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
    return "\n\n".join(_record(f"{file}:{number}", line) for number, line in lines) + "\n"


def _record(place: str, line: str) -> str:
    """A record as text: a question with its answer, as a few-shot prompt has them, or what is in `text`."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"{place} is not JSON: {error}", field="texts") from error
    if isinstance(record, dict) and {"question", "answer"} <= record.keys():
        return f"Question: {record['question']}\nAnswer: {record['answer']}"
    if isinstance(record, dict) and "text" in record:
        return str(record["text"])
    raise InvalidRequestError(f"{place} has neither `question` and `answer` nor `text`", field="texts")
