"""Follows a guide through a sequence, token by token: which tokens may come next, and whether any may.

llguidance does the work: an Earley parser over a lexer, walked along a trie of the vocabulary. What it may cost is
bounded by its own fuel, which is counted and not timed, so that a guide works everywhere or nowhere. All of this
blocks: compiling a guide takes a millisecond to a second, and much longer for some that end up refused; a mask takes
0.1 to 10 milliseconds, an advance less than that.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from zipserve.common import log
from zipserve.common.errors import InvalidRequestError
from zipserve.common.guide import Guide

_LIMITS = LLParserLimits(
    max_grammar_size=20_000,  # symbols; the default of 500,000 can take minutes to compile
    step_max_items=10_000,  # of the parser, for one mask
    max_lexer_states=50_000,  # 1 to 2 kB each
    verbose_errors=False,  # else messages repeat the whole grammar
)
_COMPILED_MAX = 32
"""Guides that are kept compiled: applications send the same ones again and again."""
_WHITESPACE = r"[ \t\n]{1,32}"
"""Between the parts of a JSON value. Without a bound, small models write spaces until they run out of tokens."""
_REASON_CHARS_MAX = 512
_log = log.get()

Mask = npt.NDArray[np.bool_]


class GuideTokenizer:
    """The vocabulary of one model as guides need it. May be used from several threads."""

    def __init__(self, tokenizer: LLTokenizer | str, vocab_tokens: int, eos_token_ids: Sequence[int]) -> None:
        """
        Args:
            tokenizer: or why there is none that guides can use; then every guide is refused.
            vocab_tokens: how many logits the model has.
            eos_token_ids: end a sequence.
        """
        self.vocab_tokens = vocab_tokens
        self.eos_token_ids = tuple(eos_token_ids)
        self.drawable = np.ones(vocab_tokens, np.bool_)
        """[vocab]: all tokens but the special ones, of which only those are drawn that end a sequence."""
        if isinstance(tokenizer, LLTokenizer):
            special = [token for token in range(vocab_tokens) if tokenizer.is_special_token(token)]
            self.drawable[list(set(special).difference(eos_token_ids))] = False
        self._tokenizer = tokenizer
        self._compiled = lru_cache(_COMPILED_MAX)(self._compile)

    @classmethod
    def load(cls, folder: Path, vocab_tokens: int, eos_token_ids: Sequence[int]) -> "GuideTokenizer":
        """Reads the fast tokenizer of a model's folder, which takes about a second. A model serves without one, too."""
        tokenizer: LLTokenizer | str
        try:
            text = (folder / "tokenizer.json").read_text()
            tokenizer = LLTokenizer(text, n_vocab=vocab_tokens, eos_token=list(eos_token_ids))
        except (OSError, ValueError) as error:
            tokenizer = str(error)
            _log.warning("guides.unavailable", why=tokenizer)
        return cls(tokenizer, vocab_tokens, eos_token_ids)

    def matcher(self, guide: Guide, token_ids: Sequence[int] = (), prompt_tokens: int = 0) -> "GuideMatcher":
        """Follows a guide from its beginning, or from where a sequence is.

        Args:
            token_ids: of the sequence so far.
            prompt_tokens: how many of them the guide says nothing of; it has followed the others.

        Raises:
            InvalidRequestError: the guide means nothing, is beyond what may be compiled, or lets no text be; or the
                sequence does not follow it, or has nothing left to follow.
        """
        if token_ids and not 1 <= prompt_tokens <= len(token_ids):
            raise InvalidRequestError(
                f"prompt_tokens is {prompt_tokens} of {len(token_ids)} tokens, which a guide counts from",
                field="prompt_tokens",
            )
        matcher = GuideMatcher(self, guide, self._compiled(guide).deep_copy())
        for token_id in token_ids[prompt_tokens:]:
            matcher.advance(token_id)
        if matcher.ended:
            raise InvalidRequestError(
                f"the guide is complete after {matcher.tokens} tokens, which leaves nothing to generate",
                field=guide.field,
            )
        return matcher

    def check(self, guide: Guide) -> None:
        """Asserts that a guide can be followed, as far as can be said before the first token.

        Raises:
            InvalidRequestError: it cannot.
        """
        allowed = self.matcher(guide).allowed()
        allowed[list(self.eos_token_ids)] = False
        if not allowed.any():
            raise InvalidRequestError(f"{guide.field} allows no text but the empty one", field=guide.field)

    def _compile(self, guide: Guide) -> LLMatcher:
        if isinstance(self._tokenizer, str):
            raise InvalidRequestError(f"outputs of this model cannot be guided: {self._tokenizer}", field=guide.field)
        matcher = LLMatcher(self._tokenizer, _grammar(guide), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidRequestError(f"{guide.field} does not compile: {_reason(matcher)}", field=guide.field)
        return matcher


class GuideMatcher:
    """Follows a guide through one sequence. One thread at a time may use it."""

    def __init__(self, tokenizer: GuideTokenizer, guide: Guide, matcher: LLMatcher) -> None:
        self.eos_token_ids = tokenizer.eos_token_ids
        self.tokens = 0
        """Of the sequence that have followed the guide."""
        self._tokenizer = tokenizer
        self._guide = guide
        self._matcher = matcher
        self._ahead: Future[Mask] | None = None

    @property
    def ended(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> Mask:
        """[vocab] bool: the tokens that may come next; those that end the sequence if the text may end here.

        Raises:
            InvalidRequestError: there are none, or finding them is beyond the limits.
        """
        ahead, self._ahead = self._ahead, None
        return self._find() if ahead is None else ahead.result()

    def look_ahead(self, executor: Executor) -> None:
        """Begins to find what is allowed next in another thread; `allowed` waits for it."""
        if self._ahead is None:
            self._ahead = executor.submit(self._find)

    def advance(self, token_id: int) -> None:
        """Goes on behind a token.

        Raises:
            InvalidRequestError: it does not follow the guide, or following it is beyond the limits.
        """
        if not self._matcher.consume_token(token_id):
            raise self._failure(f"does not go on with token id {token_id}: {_reason(self._matcher)}")
        self.tokens += 1

    def _find(self) -> Mask:
        words = allocate_token_bitmask(1, self._tokenizer.vocab_tokens)
        fill_next_token_bitmask(self._matcher, words)
        if self._matcher.is_error():
            raise self._failure(f"cannot be followed: {_reason(self._matcher)}")
        bits = np.unpackbits(words.view(np.uint8)[0], count=self._tokenizer.vocab_tokens, bitorder="little")
        allowed: Mask = bits.view(np.bool_) & self._tokenizer.drawable
        if not allowed.any():
            raise self._failure("allows only special tokens, which are never drawn")
        return allowed

    def _failure(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self._guide.field}, after {self.tokens} tokens, {what}", field=self._guide.field)


def _grammar(guide: Guide) -> str:
    """The guide as llguidance reads it."""
    match guide.kind:
        case "json_object":
            return _json_grammar('{"type": "object"}', guide)
        case "json_schema":
            return _json_grammar(guide.source[0], guide)
        case "regex":
            return LLMatcher.grammar_from_regex(guide.source[0])
        case "grammar":
            return LLMatcher.grammar_from_lark(guide.source[0])
        case "choices":
            # one terminal: where one choice begins another, both stay open
            texts = (json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in guide.source)
            return LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {' | '.join(texts)}\n")


def _json_grammar(schema: str, guide: Guide) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        raise InvalidRequestError(f"{guide.field} does not compile: {error}", field=guide.field) from error


def _reason(matcher: LLMatcher) -> str:
    """llguidance's words, on one line."""
    return " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())[:_REASON_CHARS_MAX]
