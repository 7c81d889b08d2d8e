"""Windows of tokens: a context that is coded, and the tokens after it that are scored."""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Encoding

from zipserve.bench.quality.retrieval import Lookups, sentence
from zipserve.common.errors import InvalidRequestError

RETRIEVAL = "retrieval"
"""Genre of the windows of look-ups."""
Encode = Callable[[str], Encoding]


@dataclass(frozen=True)
class Shape:
    """Sizes of windows."""

    context_tokens: int = 1024
    scored_tokens: int = 128
    """Of a window of text; one of look-ups has as many as its queries take."""
    queries: int = 12
    """Of a window of look-ups."""


@dataclass(frozen=True)
class Window:
    """Token ids: the context, the scored ones, and one more, which only is a target."""

    genre: str
    token_ids: list[int]
    context_tokens: int
    answers: tuple[slice, ...] = ()
    """Of look-ups: which rows of `targets` are the code of a query."""

    @property
    def scored(self) -> list[int]:
        """Computed after the context; the logits after each of them are compared."""
        return self.token_ids[self.context_tokens : -1]

    @property
    def targets(self) -> list[int]:
        """What really follows each of the scored tokens."""
        return self.token_ids[self.context_tokens + 1 :]


def text_windows(genre: str, token_ids: list[int], shape: Shape, first: int, count: int) -> list[Window]:
    """Cuts windows number `first` and following out of a text, one after another, without overlap.

    Raises:
        InvalidRequestError: the text is too short.
    """
    size = shape.context_tokens + shape.scored_tokens + 1
    found = len(token_ids) // size
    if found < first + count:
        raise InvalidRequestError(
            f"text {genre!r} has {found} windows of {size} tokens; {first + count} are needed", field="texts"
        )
    starts = range(first * size, (first + count) * size, size)
    return [Window(genre, token_ids[start : start + size], shape.context_tokens) for start in starts]


def retrieval_window(lookups: Lookups, encode: Encode, shape: Shape) -> Window:
    """A window of look-ups: as many of the last records as the context holds, then queries for some of them.

    The first of these records may be cut; it is not queried.

    Args:
        encode: text to tokens, with offsets in characters.

    Raises:
        InvalidRequestError: the records are fewer tokens than the context.
    """
    records = lookups.records
    ends = encode(records).offsets
    if len(ends) < shape.context_tokens:
        raise InvalidRequestError(f"{len(ends)} tokens of records do not fill a context of {shape.context_tokens}")
    # Which records are whole cannot depend on what is queried, so the queries are appended after they are known.
    kept_from = ends[-shape.context_tokens][0]
    first = sum(start < kept_from for start in _starts(lookups))
    queried = lookups.queried(first, shape.queries)
    text = records + "".join(f" {sentence(thing, lookups.codes[thing])}" for thing in queried)
    encoding = encode(text)
    offsets = encoding.offsets
    border = _first_token_behind(offsets, len(records))
    token_ids = encoding.ids[border - shape.context_tokens :]
    answers, end = [], len(records)
    for thing in queried:
        end += 1 + len(sentence(thing, lookups.codes[thing]))
        code_end = end - 1  # the full stop
        rows = [
            token - border - 1  # the row before a token predicts it
            for token, (start, stop) in enumerate(offsets)
            if start < code_end and stop > code_end - len(lookups.codes[thing])
        ]
        answers.append(slice(rows[0], rows[-1] + 1))
    return Window(RETRIEVAL, token_ids, shape.context_tokens, tuple(answers))


def _starts(lookups: Lookups) -> list[int]:
    """Where in `lookups.records` each record starts, in characters."""
    starts, at = [], 0
    for thing, code in lookups.codes.items():
        starts.append(at)
        at += len(sentence(thing, code)) + 1
    return starts


def _first_token_behind(offsets: list[tuple[int, int]], end: int) -> int:
    """Index of the first token that is not of the text's first `end` characters."""
    return next(token for token, (_, stop) in enumerate(offsets) if stop > end)
