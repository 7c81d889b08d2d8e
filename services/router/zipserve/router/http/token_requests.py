"""POST /tokenize and /detokenize: vLLM's requests for what the domain's Tokenize and Detokenize do."""

from typing import Any, Literal

from pydantic_core import from_json

from zipserve.router.http.fields import Body, Ids
from zipserve.router.http.messages import Conversation
from zipserve.router.http.tools import Tool
from zipserve.v1.inference_service_pb2 import TokenizeRequest


class TokenizeText(Body):
    """Plain text."""

    model: str | None = None
    prompt: str
    add_special_tokens: Literal[True] | None = None
    return_token_strs: bool | None = None

    def to_proto(self) -> TokenizeRequest:
        """The domain's request."""
        return TokenizeRequest(model=self.model or "", text=self.prompt)


class TokenizeChat(Conversation):
    """A conversation."""

    model: str | None = None
    add_special_tokens: Literal[False] | None = None
    """The template has them."""
    return_token_strs: bool | None = None
    tools: list[Tool] | None = None

    def to_proto(self) -> TokenizeRequest:
        """The domain's request."""
        return TokenizeRequest(model=self.model or "", chat=self.to_prompt([tool.text() for tool in self.tools or ()]))


class Detokenize(Body):
    """Token ids."""

    model: str | None = None
    tokens: Ids


def tokenize_kind(body: bytes) -> type[TokenizeText] | type[TokenizeChat]:
    """Which of the two a body is."""
    try:
        fields = from_json(body)
    except ValueError:  # is explained where it is parsed
        return TokenizeText
    return TokenizeChat if isinstance(fields, dict) and "messages" in fields else TokenizeText


def tokenized(token_ids: list[int], context_tokens: int, texts: list[str] | None) -> dict[str, Any]:
    """The answer."""
    return {"count": len(token_ids), "max_model_len": context_tokens, "tokens": token_ids, "token_strs": texts}
