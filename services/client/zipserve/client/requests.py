"""What callers say, as the messages of the protos. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, cast

from zipserve.v1 import inference_service_pb2 as pb
from zipserve.v1.sampling_pb2 import Guide, SamplingParams, StopConditions


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the assistant made."""

    id: str
    """What the answer refers to."""
    name: str
    """The function's."""
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    """"system", "user" or "assistant", or what else the model's template knows."""
    content: str
    name: str = ""
    """Who it is among those of the same role."""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""
    """In a message of the role "tool": which call it answers."""


Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
"""Plain text, sent as it is; a conversation, rendered with the model's chat template; or token ids."""


class Sampling(TypedDict, total=False):
    """How tokens are drawn; see `SamplingParams` in sampling.proto. What is None or missing is left to the server."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    """Added to the logits of these tokens."""
    logprobs: int | None
    """Tell log-probabilities of the generated tokens, and of so many of the most likely ones."""
    prompt_logprobs: int | None
    """The same for the tokens of the prompt."""


class Stop(TypedDict, total=False):
    """When to end; see `StopConditions` in sampling.proto."""

    max_tokens: int | None
    stop: Sequence[str]
    """Strings that end the answer and are no part of it."""
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool


class Template(TypedDict, total=False):
    """More for the chat template of a conversation."""

    tools: Sequence[Mapping[str, Any]]
    """Tools that the model may call, each as OpenAI's API has it: {"type": "function", "function": {…}}."""
    template_arguments: Mapping[str, Any]
    """More arguments of the template by name; values that JSON can say."""
    continue_final_message: bool
    """The last message is the beginning of the answer."""


class Parameters(Sampling, Stop, Template, total=False):
    """Of one request."""

    model: str
    """Id; empty or missing: the only one served."""
    n: int
    """Answers to generate."""
    guide: Guide | None
    """What the output must look like; see `guides`."""
    priority: int
    """Higher goes first."""
    cache_salt: str
    """KV is shared only among requests of the same one."""


def generate_request(prompt: Prompt, parameters: Parameters) -> pb.GenerateRequest:
    """A request to generate.

    Raises:
        TypeError: a parameter is unknown or of the wrong type.
        ValueError: a number does not fit into its field.
    """
    given = dict(parameters)
    template = _take(given, Template)
    request = pb.GenerateRequest(
        sampling=SamplingParams(**_take(given, Sampling)), stop=StopConditions(**_take(given, Stop))
    )
    unknown = given.keys() - Parameters.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown parameters: {', '.join(sorted(unknown))}")
    request.MergeFrom(pb.GenerateRequest(**cast(dict[str, Any], given)))
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], int):
        request.token_ids.ids.extend(cast(Sequence[int], prompt))
    else:
        request.chat.CopyFrom(_chat(cast(Sequence[Message], prompt), template))
    return request


def tokenize_request(prompt: str | Sequence[Message], model: str, template: Template) -> pb.TokenizeRequest:
    """A request to tokenize.

    Raises:
        TypeError: the prompt is of the wrong type.
    """
    if isinstance(prompt, str):
        return pb.TokenizeRequest(model=model, text=prompt)
    return pb.TokenizeRequest(model=model, chat=_chat(prompt, cast(dict[str, Any], template)))


def _take(given: dict[str, Any], group: type) -> dict[str, Any]:
    """Takes the parameters of a group out."""
    return {name: given.pop(name) for name in group.__annotations__ if name in given}


def _chat(messages: Sequence[Message], template: dict[str, Any]) -> pb.ChatPrompt:
    return pb.ChatPrompt(
        messages=[
            pb.ChatMessage(
                role=message.role,
                content=message.content,
                name=message.name,
                tool_calls=[
                    pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls
                ],
                tool_call_id=message.tool_call_id,
            )
            for message in messages
        ],
        tools=[json.dumps(tool) for tool in template.get("tools", ())],
        template_arguments={name: json.dumps(v) for name, v in template.get("template_arguments", {}).items()},
        continue_final_message=template.get("continue_final_message", False),
    )
