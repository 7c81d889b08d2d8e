"""What a keys file says: one JSON object a line. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zipserve.common.errors import InvalidRequestError
from zipserve.router.caller import Caller


class _Line(BaseModel):
    """One key, as the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key, in hex."""
    cache_salt: str = Field(default="", max_length=256)
    priority_max: int | None = None
    requests_max: int | None = Field(default=None, ge=1)
    expires_at: datetime | None = Field(default=None, strict=False)
    """With its time zone."""

    @field_validator("expires_at")
    @classmethod
    def _has_a_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("needs a time zone, as in 2030-01-31T12:00:00Z")
        return value


@dataclass(frozen=True)
class Key:
    """A key that the router knows."""

    sha256: str
    caller: Caller
    expires_at_s: float = float("inf")
    """Seconds since 1970."""


def parse(text: str) -> Mapping[str, Key]:
    """Keys by their hash. Empty lines, and those that begin with #, are skipped.

    Raises:
        InvalidRequestError: a line is wrong, two keys have the same name or hash, or there is none. The message repeats
            nothing of a line, which may hold a key by mistake.
    """
    keys: dict[str, Key] = {}
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        entry = _line(number, line)
        if entry.name in names or entry.sha256 in keys:
            raise InvalidRequestError(f"line {number}: the name or key of {entry.name!r} stands there twice")
        names.add(entry.name)
        caller = Caller(entry.name, entry.cache_salt, entry.priority_max, entry.requests_max)
        expires_at_s = entry.expires_at.timestamp() if entry.expires_at else float("inf")
        keys[entry.sha256] = Key(entry.sha256, caller, expires_at_s)
    if not keys:
        raise InvalidRequestError("there is no key in it, so that nobody could call")
    return keys


def _line(number: int, line: str) -> _Line:
    try:
        values: Any = json.loads(line)
        return _Line.model_validate(values)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"line {number} is not JSON: {error.msg}") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["type"] != "extra_forbidden" else "an unknown field"
            for e in error.errors(include_input=False, include_url=False)
        )
        raise InvalidRequestError(f"line {number}: {wrong}") from None
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"line {number} is no JSON that can be read") from None
