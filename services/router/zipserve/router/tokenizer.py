"""Prompts to token ids and back: plain text, or a conversation in the model's chat template.

Uses the files of the model's folder only. Long prompts are rendered and tokenized in a thread, by calls that release
the GIL, so that streams of other requests go on meanwhile.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from zipserve.common.errors import InvalidRequestError
from zipserve.router.chat_template import ChatTemplate
from zipserve.router.detokenizer import Detokenizer
from zipserve.router.token_bytes import TokenBytes
from zipserve.v1.inference_service_pb2 import ChatPrompt

T = TypeVar("T")

_INLINE_MAX = 2048
"""Shorter prompts, in characters or ids, are handled on the event loop; that takes about a millisecond at most."""


_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Of tokenizers that are nothing but their tokenizer.json, by the names that tokenizer_config.json has for them."""


class PromptTokenizer:
    """The tokenizer of one model."""

    def __init__(self, backend: Tokenizer, template: ChatTemplate | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self.chat = template is not None
        """Whether it has a chat template."""
        self.tools = template is not None and template.tools
        """Whether that template knows tools."""
        self.hermes = template is not None and template.hermes
        """Whether that template has tools called as Hermes does."""
        self.bytes_of = TokenBytes(backend)
        """The bytes that a token stands for."""
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        """Ids of tokens that have no text."""

    @classmethod
    def load(cls, folder: Path) -> "PromptTokenizer":
        """Reads the tokenizer of a model's folder.

        Raises:
            InvalidRequestError: the folder has no fast tokenizer (tokenizer.json, or files that convert to it).
        """
        tokenizer = _read(folder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InvalidRequestError(f"model folder {folder} has no fast tokenizer (tokenizer.json)", field="model")
        return cls(backend, ChatTemplate(tokenizer) if tokenizer.chat_template else None)

    async def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, with the special tokens that the tokenizer adds by itself."""
        return await self._run(len(text), lambda: self._encode(text, add_special_tokens=True))

    async def encode_chat(self, chat: ChatPrompt) -> list[int]:
        """Ids of a conversation in the model's chat template, up to where the answer begins or goes on.

        Raises:
            InvalidRequestError: there is no template, or it cannot render this.
        """
        template = self._template
        if template is None:
            raise InvalidRequestError("this model has no chat template; send text or token_ids", field="chat")
        return await self._run(chat.ByteSize(), lambda: self._encode(template.render(chat), add_special_tokens=False))

    def detokenizer(self) -> Detokenizer:
        """A detokenizer for one new sequence."""
        return Detokenizer(self.decode, self.special_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids at once, special tokens skipped."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    async def decode_all(self, token_ids: Sequence[int]) -> str:
        """The same, of any number of ids, beside which the streams of other requests go on."""
        return await self._run(len(token_ids), lambda: self._decode_freely(token_ids))

    @staticmethod
    async def _run(length: int, compute: Callable[[], T]) -> T:
        return compute() if length <= _INLINE_MAX else await asyncio.to_thread(compute)

    def _decode_freely(self, token_ids: Sequence[int]) -> str:
        # the batch form, because the single one keeps the GIL
        (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=True)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # the batch form, because the single one keeps the GIL
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids


def _read(folder: Path) -> Any:
    # transformers takes seconds to import; `AutoTokenizer` also has it import torch where that is installed: more of
    # them, and 300 MB
    if _is_plain(folder):
        from transformers import PreTrainedTokenizerFast as Way  # noqa: PLC0415
    else:
        from transformers import AutoTokenizer as Way  # type: ignore[assignment]  # noqa: PLC0415
    return Way.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _is_plain(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    return json.loads(config.read_text()).get("tokenizer_class") in _PLAIN_CLASSES
