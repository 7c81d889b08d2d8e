"""Messages of a conversation: JSON to the domain's."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationError

from zipserve.common.errors import InvalidRequestError
from zipserve.router.http.fields import Body, Unsupported, dumps, shown
from zipserve.v1.inference_service_pb2 import ChatMessage, ChatPrompt, ToolCall

MESSAGES_MAX = 4096


class _TextPart(Body):
    type: Literal["text"]
    text: str


def _content(value: Any) -> str | None:
    """A text, or the parts of one."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f'part {i} is of type {shown(kind)}; only parts of type "text" are supported')
        try:
            texts.append(_TextPart.model_validate(part).text)
        except ValidationError as error:
            raise ValueError(f'part {i} must be {{"type": "text", "text": a string}} and nothing else') from error
    return "\n".join(texts)


Content = Annotated[str | None, PlainValidator(_content)]


class CalledFunction(Body):
    """What was called."""

    name: str
    arguments: str


class Call(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class _Message(Body):
    role: str
    content: Content
    name: str | None = None

    def to_proto(self) -> ChatMessage:
        """The domain's message."""
        # what OpenAI calls developer is system to all templates
        role = {"developer": "system"}.get(self.role, self.role)
        return ChatMessage(role=role, content=self.content or "", name=self.name or "")


class _Said(_Message):
    role: Literal["system", "developer", "user"]


class _Answered(_Message):
    role: Literal["assistant"]
    content: Content = None
    tool_calls: list[Call] | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def to_proto(self) -> ChatMessage:
        message = super().to_proto()
        message.tool_calls.extend(
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls or ()
        )
        return message


class _Returned(_Message):
    role: Literal["tool"]
    tool_call_id: str

    def to_proto(self) -> ChatMessage:
        message = super().to_proto()
        message.tool_call_id = self.tool_call_id
        return message


Message = Annotated[_Said | _Answered | _Returned, Field(discriminator="role")]


class Conversation(Body):
    """The fields of a request that make its prompt, tools excepted."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES_MAX)]
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def to_prompt(self, tools: list[str]) -> ChatPrompt:
        """The domain's prompt.

        Raises:
            InvalidRequestError: a message says nothing, or fields do not go together.
        """
        for i, message in enumerate(self.messages):
            if message.content is None and not getattr(message, "tool_calls", None):
                raise InvalidRequestError(
                    f"messages[{i}].content is null, must be a string or a list of text parts",
                    field=f"messages[{i}].content",
                )
        arguments = {name: dumps(value) for name, value in (self.chat_template_kwargs or {}).items()}
        if self.add_generation_prompt is not None:
            arguments["add_generation_prompt"] = dumps(self.add_generation_prompt)
        return ChatPrompt(
            messages=[message.to_proto() for message in self.messages],
            tools=tools,
            template_arguments=arguments,
            continue_final_message=bool(self.continue_final_message),
        )
