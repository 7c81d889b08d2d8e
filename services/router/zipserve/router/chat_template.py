"""Conversations to text, as the model's chat template writes them.

What a client sends is checked here as far as the template cannot be trusted to: roles, calls of tools, and arguments
that would change what the renderer itself does.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from zipserve.common.errors import InvalidRequestError
from zipserve.v1.inference_service_pb2 import ChatMessage, ChatPrompt

CALL_BEGIN = "<tool_call>"
"""What a model of the Hermes convention writes before a call of a tool."""
TEMPLATE_ARGUMENTS_MAX = 64
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_PROBE = {
    "type": "function",
    "function": {"name": "zipserve_probe", "description": "", "parameters": {"type": "object", "properties": {}}},
}


class ChatTemplate:
    """The template of one model.

    Args:
        tokenizer: a tokenizer of transformers that has a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        own = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._reserved = (own | {"messages"} | set(tokenizer.special_tokens_map)) - {"add_generation_prompt"}
        probed = self._probe()
        self.tools = _PROBE["function"]["name"] in probed  # type: ignore[index]  # it is a dict
        """Whether it tells the model of tools."""
        self.hermes = self.tools and CALL_BEGIN in probed
        """Whether it asks the model to call them as Hermes does."""

    def render(self, chat: ChatPrompt) -> str:
        """The conversation up to where the answer begins, or goes on.

        Raises:
            InvalidRequestError: it is not one, asks for what the template does not know, or the template refuses it.
        """
        if chat.tools and not self.tools:
            raise InvalidRequestError(
                f"chat.tools has {len(chat.tools)} tools; this model's chat template knows none", field="chat.tools"
            )
        messages = _messages(chat.messages)
        if chat.continue_final_message and chat.messages[-1].role != "assistant":
            raise InvalidRequestError(
                f"chat.continue_final_message is set, but the last message is of role {chat.messages[-1].role!r}, must "
                "be of 'assistant'",
                field="chat.continue_final_message",
            )
        arguments = {"add_generation_prompt": not chat.continue_final_message, **self._arguments(chat)}
        tools = [_object(text, f"chat.tools[{i}]") for i, text in enumerate(chat.tools)] or None
        try:
            return self._render(messages, tools, continue_final_message=chat.continue_final_message, **arguments)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {str(error)[:512]}", field="chat.messages"
            ) from error

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, **arguments: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **arguments))

    def _probe(self) -> str:
        try:
            return self._render([{"role": "user", "content": "x"}], [_PROBE], add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            return ""

    def _arguments(self, chat: ChatPrompt) -> Mapping[str, Any]:
        field = "chat.template_arguments"
        if len(chat.template_arguments) > TEMPLATE_ARGUMENTS_MAX:
            raise InvalidRequestError(
                f"{field} has {len(chat.template_arguments)} entries, at most {TEMPLATE_ARGUMENTS_MAX} are allowed",
                field=field,
            )
        for name in chat.template_arguments:
            if not name.isidentifier() or name in self._reserved:
                raise InvalidRequestError(
                    f"{field} has {name[:64]!r}, which is not an argument that a template takes from a request",
                    field=f"{field}[{name[:64]}]",
                )
        arguments = {name: _json(text, f"{field}[{name}]") for name, text in chat.template_arguments.items()}
        if chat.continue_final_message and arguments.get("add_generation_prompt"):
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other", field="add_generation_prompt"
            )
        return arguments


def _messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    if not messages:
        raise InvalidRequestError("chat.messages is empty, needs at least one", field="chat.messages")
    return [_message(message, f"chat.messages[{i}]") for i, message in enumerate(messages)]


def _message(message: ChatMessage, field: str) -> dict[str, Any]:
    if not _ROLE.fullmatch(message.role):
        raise InvalidRequestError(
            f"{field}.role is {message.role[:64]!r}, must be a word such as 'user'", field=f"{field}.role"
        )
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequestError(
            f"{field}.tool_calls is set, but the role is {message.role!r}, must be 'assistant'",
            field=f"{field}.tool_calls",
        )
    if message.tool_call_id and message.role != "tool":
        raise InvalidRequestError(
            f"{field}.tool_call_id is {message.tool_call_id[:64]!r}, but the role is {message.role!r}, must be 'tool'",
            field=f"{field}.tool_call_id",
        )
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        told["name"] = message.name
    if message.tool_call_id:
        told["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    # templates write the object themselves
                    "arguments": _object(call.arguments or "{}", f"{field}.tool_calls[{i}].arguments"),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return told


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field} is {text[:64]!r}, must be JSON: {error}", field=field) from error


def _object(text: str, field: str) -> dict[str, Any]:
    value = _json(text, field)
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} is {text[:64]!r}, must be a JSON object", field=field)
    return value
