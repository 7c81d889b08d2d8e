"""How bodies of requests are read: strictly, so that nothing that a client asks for is silently left out.

A field that is not known, or has a value that is not served, is refused by its name and value.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from zipserve.common.errors import InvalidRequestError

_VALUE_CHARS_MAX = 64


class Body(BaseModel):
    """Base of all that is read from a body."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


M = TypeVar("M", bound=Body)


def _refuse(value: Any) -> None:
    if value is not None:
        raise ValueError("which this server does not support")


Unsupported = Annotated[None, BeforeValidator(_refuse)]
"""A field of OpenAI's API that is not served; null means as much as nothing."""
Ignored = str | None
"""A label that has no effect on the answer, here as there."""
Uint32 = Annotated[int, Field(ge=0, lt=1 << 32)]
Ids = Annotated[list[Uint32], Field(fail_fast=True)]
Int32 = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]


def parse(model: type[M], body: bytes) -> M:
    """Reads a JSON body.

    Raises:
        InvalidRequestError: it is no JSON, or has a field or value that is not served.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)[0], body) from error


def _explained(error: Any, body: bytes) -> InvalidRequestError:
    """The first thing that pydantic has found, in words that name field and value."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {context['error']}")
    if not error["loc"]:
        return InvalidRequestError("the body must be a JSON object")
    field = name_of(_steps(from_json(body), error["loc"]))
    if kind.startswith("union_tag"):
        field = f"{field}.{context['discriminator'].strip(chr(39))}"
    if kind in ("missing", "union_tag_not_found"):
        return InvalidRequestError(f"{field} is missing", field=field)
    if kind == "union_tag_invalid":
        return InvalidRequestError(
            f"{field} is {shown(context['tag'])}, must be one of {context['expected_tags']}", field=field
        )
    value = shown(error["input"])
    if kind == "extra_forbidden":
        return InvalidRequestError(f"{field} is {value}, but there is no such field", field=field)
    reason = str(error["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    return InvalidRequestError(f"{field} is {value}, {reason}", field=field)


def _steps(value: Any, location: Sequence[str | int]) -> list[str | int]:
    """A path without what pydantic adds of its own: the kinds of a union, and marks of keys."""
    steps: list[str | int] = []
    for i, step in enumerate(location):
        there = isinstance(step, str) and isinstance(value, dict) and step in value
        if there or (isinstance(step, int) and isinstance(value, list)):
            value = value[step]
        elif i < len(location) - 1 or step == "[key]":
            continue
        steps.append(step)
    return steps


def name_of(steps: Sequence[str | int]) -> str:
    """A path as clients write it, such as messages[0].role."""
    name = ""
    for step in steps:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


def shown(value: Any) -> str:
    """A value as it came, cut."""
    text = dumps(value)
    return text if len(text) <= _VALUE_CHARS_MAX else text[: _VALUE_CHARS_MAX - 1] + "…"


def dumps(value: Any) -> str:
    """Compact JSON."""
    return _ENCODER.encode(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
