"""Prompts to token ids: plain text, or a conversation in the model's chat template.

Uses the files of the model's folder only. Long prompts are rendered and tokenized in a thread, by calls that release
the GIL, so that streams of other requests go on meanwhile.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError
from tokenizers import Tokenizer

from zipserve.common.errors import InvalidRequestError
from zipserve.router.detokenizer import Detokenizer
from zipserve.v1.inference_service_pb2 import ChatMessage

T = TypeVar("T")

_INLINE_MAX = 2048
"""Shorter prompts, in characters or ids, are handled on the event loop; that takes about a millisecond at most."""
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class PromptTokenizer:
    """The tokenizer of one model."""

    def __init__(
        self, backend: Tokenizer, render: Callable[[list[dict[str, str]]], str] | None, *, tools: bool = False
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._render = render
        self.chat = render is not None
        """Whether it has a chat template."""
        self.tools = tools
        """Whether that template knows tools."""
        self._special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def load(cls, folder: Path) -> "PromptTokenizer":
        """Reads the tokenizer of a model's folder.

        Raises:
            InvalidRequestError: the folder has no fast tokenizer (tokenizer.json, or files that convert to it).
        """
        from transformers import AutoTokenizer  # noqa: PLC0415  takes seconds, and tests of the rest do without

        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InvalidRequestError(f"model folder {folder} has no fast tokenizer (tokenizer.json)", field="model")

        def render(messages: list[dict[str, str]]) -> str:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        tools = re.search(r"\btools\b", str(tokenizer.chat_template or "")) is not None
        return cls(backend, render if tokenizer.chat_template else None, tools=tools)

    async def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, with the special tokens that the tokenizer adds by itself."""
        return await self._run(len(text), lambda: self._encode(text, add_special_tokens=True))

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of a conversation in the model's chat template, up to where the answer begins.

        Raises:
            InvalidRequestError: there are no messages, a role is malformed, or the template refuses them.
        """
        if self._render is None:
            raise InvalidRequestError("this model has no chat template; send text or token_ids", field="chat")
        if not messages:
            raise InvalidRequestError("chat.messages is empty, needs at least one", field="chat.messages")
        for i, message in enumerate(messages):
            if not _ROLE.fullmatch(message.role):
                raise InvalidRequestError(
                    f"chat.messages[{i}].role is {message.role[:64]!r}, must be a word such as 'user'",
                    field=f"chat.messages[{i}].role",
                )
        chars = sum(len(message.content) for message in messages)
        return await self._run(chars, lambda: self._encode_chat(messages))

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one new sequence."""
        return Detokenizer(self.decode, self._special_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids at once, special tokens skipped."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    async def decode_all(self, token_ids: Sequence[int]) -> str:
        """The same, of any number of ids, beside which the streams of other requests go on."""
        return await self._run(len(token_ids), lambda: self._decode_freely(token_ids))

    @staticmethod
    async def _run(length: int, compute: Callable[[], T]) -> T:
        return compute() if length <= _INLINE_MAX else await asyncio.to_thread(compute)

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        assert self._render is not None
        try:
            text = self._render([{"role": message.role, "content": message.content} for message in messages])
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {error}", field="chat.messages"
            ) from error
        return self._encode(text, add_special_tokens=False)

    def _decode_freely(self, token_ids: Sequence[int]) -> str:
        # the batch form, because the single one keeps the GIL
        (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=True)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # the batch form, because the single one keeps the GIL
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids
