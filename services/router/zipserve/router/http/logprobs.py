"""Log-probabilities in the three shapes that clients know: of chats, of completions, and vLLM's of prompts."""

import codecs
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from zipserve.v1.sampling_pb2 import TokenLogprobs

LOGPROB_MIN = -9999.0
"""What JSON has no number for is told as this, as OpenAI does."""


@dataclass(frozen=True)
class Tokens:
    """What tokens are to people."""

    bytes_of: Callable[[int], bytes]
    special: Collection[int]
    """Ids without text of their own."""

    def text(self, token_id: int) -> str:
        """The token by itself; half characters show as U+FFFD."""
        return self.bytes_of(token_id).decode(errors="replace")


def of_chat(tokens: Tokens, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """The `content` of a chat's logprobs."""
    return [
        {
            **_entry(tokens, token_id, at.logprob),
            "top_logprobs": [
                _entry(tokens, top_id, logprob)
                for top_id, logprob in zip(at.top_token_ids, at.top_logprobs, strict=True)
            ],
        }
        for token_id, at in zip(token_ids, logprobs, strict=True)
    ]


def of_prompt(
    tokens: Tokens, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: of each token by id its own and the likeliest ones, null for the first."""
    return [None, *(_by_id(tokens, token_id, at) for token_id, at in zip(token_ids[1:], logprobs, strict=True))]


class CompletionLogprobs:
    """The logprobs of one completion, in as many pieces as it comes; offsets count from its beginning, an echoed prompt
    included.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """The next tokens; None for the first of a prompt."""
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, at in zip(token_ids, logprobs, strict=True):
            told["tokens"].append(self._tokens.text(token_id))
            told["text_offset"].append(self._characters)
            told["token_logprobs"].append(None if at is None else _finite(at.logprob))
            told["top_logprobs"].append(None if at is None else self._top(token_id, at))
            if token_id not in self._tokens.special:
                self._characters += len(self._decoder.decode(self._tokens.bytes_of(token_id)))
        return told

    def _top(self, token_id: int, at: TokenLogprobs) -> dict[str, float]:
        text = self._tokens.text
        own = {text(token_id): _finite(at.logprob)}
        return {text(i): _finite(p) for i, p in zip(at.top_token_ids, at.top_logprobs, strict=True)} | own


def _entry(tokens: Tokens, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokens.bytes_of(token_id)
    return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _by_id(tokens: Tokens, token_id: int, at: TokenLogprobs) -> dict[str, dict[str, Any]]:
    told = {token_id: _ranked(tokens, token_id, at.logprob, None)}
    for rank, (top_id, logprob) in enumerate(zip(at.top_token_ids, at.top_logprobs, strict=True), start=1):
        told[top_id] = _ranked(tokens, top_id, logprob, rank)
    return {str(i): entry for i, entry in told.items()}


def _ranked(tokens: Tokens, token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokens.text(token_id)}


def _finite(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN) if logprob == logprob else LOGPROB_MIN  # noqa: PLR0124  NaN
