"""Tools that a model may call: what a request says of them, and what its answer must therefore look like."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from zipserve.common.errors import InvalidRequestError
from zipserve.router.http.fields import Body, dumps
from zipserve.v1.sampling_pb2 import Guide

NAME = r"^[A-Za-z0-9_-]{1,64}$"
TOOLS_MAX = 128
CALL_END = "</tool_call>"
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(Body):
    """A function by its name and the JSON Schema of its arguments."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Where a call is demanded, its arguments fit the schema in any case; where it is the model's choice, never."""


class Tool(Body):
    """A tool; only functions there are."""

    type: Literal["function"]
    function: Function

    def text(self) -> str:
        """The JSON object that the model is told."""
        told: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            told["description"] = self.function.description
        told["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return dumps({"type": self.type, "function": told})


def _choice(value: Any) -> str | None:
    """`none`, `auto`, `required`, or a function's name after a colon."""
    if value is None or value in ("none", "auto", "required"):
        return value if value is None else str(value)
    if isinstance(value, dict) and value.keys() == {"type", "function"} and value["type"] == "function":
        function = value["function"]
        if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
            return f":{function['name']}"
    raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}')


class ToolFields(Body):
    """The fields of a request."""

    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Annotated[str | None, PlainValidator(_choice)] = None
    parallel_tool_calls: bool | None = None

    @property
    def offered(self) -> Sequence[Tool]:
        """Tools that the model is told of."""
        return () if self.tool_choice == "none" else self.tools or ()

    def check_tools(self, *, known: bool) -> None:
        """Checks the fields against each other and the model.

        Args:
            known: the model's chat template tells of tools, and has them called as Hermes does.

        Raises:
            InvalidRequestError: they do not fit.
        """
        if not self.tools:
            if self.tool_choice not in (None, "none"):
                raise InvalidRequestError("tool_choice needs tools, there are none", field="tool_choice")
            if self.parallel_tool_calls is not None:
                raise InvalidRequestError(
                    "parallel_tool_calls needs tools, there are none", field="parallel_tool_calls"
                )
            return
        names = [tool.function.name for tool in self.tools]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise InvalidRequestError(f"tools has {twice!r} twice", field="tools")
        if self.tool_choice is not None and self.tool_choice[0] == ":" and self.tool_choice[1:] not in names:
            raise InvalidRequestError(
                f"tool_choice is {self.tool_choice[1:][:64]!r}, which is none of the tools", field="tool_choice"
            )
        if self.offered and not known:
            raise InvalidRequestError(
                f"tools has {len(names)} tools; this model's chat template knows none, or none that are called with "
                "<tool_call>",
                field="tools",
            )

    def tool_guide(self) -> Guide | None:
        """The guide that enforces a call; None: the model may answer as it likes."""
        if self.tool_choice is None or self.tool_choice in ("none", "auto"):
            return None
        name = self.tool_choice.removeprefix(":")
        required = self.tool_choice == "required"
        asked = [tool.function for tool in self.offered if required or tool.function.name == name]
        return Guide(grammar=_grammar(asked, several=required and self.parallel_tool_calls is not False))

    def stops(self) -> list[str]:
        """Where an answer ends that may have one call only."""
        return [CALL_END] if self.offered and self.parallel_tool_calls is False and not self.tool_guide() else []


def _grammar(functions: Sequence[Function], *, several: bool) -> str:
    """Lark's, as llguidance reads it: each function's arguments are a rule with its own schema, so that references
    within the schema keep their root.
    """
    calls = [f"call_{i}" for i in range(len(functions))]
    more = r" (/\n/ call)*" if several else ""
    lines = [f"start: call{more}", f"call: {' | '.join(calls)}"]
    end = dumps("}\n" + CALL_END)
    for call, function in zip(calls, functions, strict=True):
        begin = f'<tool_call>\n{{"name": {dumps(function.name)}, "arguments": '
        schema = function.parameters or _NO_PARAMETERS
        lines.append(f"{call}: {dumps(begin)} arguments_{call} {end}")
        lines.append(f"arguments_{call}: %json {dumps(schema)}")
    return "\n".join(lines) + "\n"
