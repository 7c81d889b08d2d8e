"""Errors as OpenAI's API tells them: a status, and {"error": {"message", "type", "param", "code"}}."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from zipserve.common.errors import (
    DeadlineError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    SlowReaderError,
    UnauthenticatedError,
    UnavailableError,
    ZipserveError,
)

_MESSAGE_CHARS_MAX = 1024
# By class, the first that fits: status, type, and the code where it is not the error's own reason.
_KINDS: tuple[tuple[type[ZipserveError], int, str, str], ...] = (
    (InvalidRequestError, 400, "invalid_request_error", ""),
    (UnauthenticatedError, 401, "invalid_request_error", "invalid_api_key"),
    (ModelNotFoundError, 404, "invalid_request_error", ""),
    (OverloadedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (SlowReaderError, 429, "rate_limit_error", ""),
    (UnavailableError, 503, "service_unavailable_error", ""),
    (DeadlineError, 504, "timeout_error", ""),
    (ZipserveError, 500, "server_error", ""),
)
# Fields of the domain's messages, and what they are called in OpenAI's API.
_NAMES = {
    "sampling.": "",
    "stop.": "",
    "token_ids.ids": "prompt",
    "chat.messages": "messages",
    "chat.tools": "tools",
    "chat.template_arguments": "chat_template_kwargs",
    "chat.continue_final_message": "continue_final_message",
    "chat": "messages",
}


@dataclass(frozen=True)
class Problem:
    """An error as it is sent."""

    reason: str
    """In metrics."""
    status: int
    message: str
    type: str
    param: str | None
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, object]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def problem_of(error: ZipserveError, names: Mapping[str, str] | None = None) -> Problem:
    """Says an error in HTTP.

    Args:
        names: what fields of the domain are called in the request at hand, where it is not the usual.
    """
    status, kind, code = next((status, kind, code) for cls, status, kind, code in _KINDS if isinstance(error, cls))
    message, param = error.message, None
    if isinstance(error, InvalidRequestError) and error.field:
        param = public_name(error.field, {**_NAMES, **(names or {})})
        if not error.field.isalpha():  # else it may be a word of the sentence
            message = message.replace(error.field, param)
    elif isinstance(error, ModelNotFoundError):
        param = "model"
    headers = {}
    if isinstance(error, OverloadedError):
        headers = {
            "retry-after": str(max(1, math.ceil(error.retry_after_s))),
            "retry-after-ms": str(math.ceil(error.retry_after_s * 1000)),
        }
    elif isinstance(error, UnauthenticatedError):
        headers = {"www-authenticate": "Bearer"}
    return Problem(error.reason, status, _cut(message), kind, param, code or error.reason.lower(), headers)


def refusal(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> Problem:
    """A request that HTTP itself forbids."""
    return Problem(code.upper(), status, message, "invalid_request_error", None, code, headers or {})


class Refused(Exception):
    """Carries a problem to where it is answered."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def public_name(name: str, names: Mapping[str, str]) -> str:
    """What a field of the domain is called outside: the longest known beginning of it is replaced."""
    for known in sorted(names, key=len, reverse=True):
        rest = name.removeprefix(known)
        if name.startswith(known) and (known[-1] == "." or not rest or rest[0] in ".["):
            return names[known] + rest
    return name


def _cut(message: str) -> str:
    return message if len(message) <= _MESSAGE_CHARS_MAX else message[: _MESSAGE_CHARS_MAX - 1] + "…"
