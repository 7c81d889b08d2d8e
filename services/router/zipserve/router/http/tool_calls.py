"""Calls of tools in what a model writes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes).

Reads text in whatever pieces it comes, and tells of a call as soon as its name is there; its arguments follow as they
come. The result does not depend on where the text is cut.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zipserve.router.chat_template import CALL_BEGIN
from zipserve.router.http.fields import dumps
from zipserve.router.http.tools import CALL_END

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_CALL_CHARS_MAX = 1 << 16
"""A call whose name comes later than this is text."""


@dataclass(frozen=True)
class Said:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True)
class Called:
    """A call begins."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments."""

    index: int
    text: str


Piece = Said | Called | Arguments


class ToolCallParser:
    """Feeds on the text of one answer."""

    def __init__(self) -> None:
        self.calls = 0
        """Calls so far."""
        self._held = ""
        """Text that has been read, but not told of."""
        self._step: Callable[[list[Piece]], bool] = self._outside
        """Takes what it can from the held text; False when it needs more."""
        self._scanner = _ObjectScanner()

    def feed(self, text: str) -> list[Piece]:
        """What the next piece of text lets tell."""
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """The rest, when nothing follows any more."""
        pieces: list[Piece] = []
        held, self._held = self._held, ""
        if self._step == self._opened and not self._whole(held, pieces):
            pieces.append(Said(CALL_BEGIN + held))
        elif self._step == self._outside and held and not (self.calls and held.isspace()):
            pieces.append(Said(held))
        return pieces

    def _outside(self, pieces: list[Piece]) -> bool:
        said, found, rest = self._held.partition(CALL_BEGIN)
        if found:
            said, self._held, self._step = said.rstrip(), rest, self._opened
        else:
            kept = _undecided(said)
            said, self._held = said[: len(said) - kept], said[len(said) - kept :]
        if said:
            pieces.append(Said(said))
        return bool(found)

    def _opened(self, pieces: list[Piece]) -> bool:
        header = _HEADER.match(self._held)
        if header:
            pieces.append(Called(self.calls, header[1]))
            self.calls += 1
            self._held, self._step, self._scanner = self._held[header.end() :], self._in_arguments, _ObjectScanner()
            return True
        block, found, rest = self._held.partition(CALL_END)
        if not found and len(block) < _CALL_CHARS_MAX:
            return False
        if not found or not self._whole(block, pieces):
            pieces.append(Said(CALL_BEGIN + block + found))
        self._held, self._step = rest, self._outside
        return True

    def _in_arguments(self, pieces: list[Piece]) -> bool:
        end = self._scanner.scan(self._held)
        if end:
            pieces.append(Arguments(self.calls - 1, self._held[:end]))
        self._held = self._held[end:]
        if self._scanner.ended:
            self._step = self._closing
        return self._scanner.ended

    def _closing(self, pieces: list[Piece]) -> bool:
        _, found, rest = self._held.partition(CALL_END)
        if found:
            self._held, self._step = rest, self._outside
        else:
            self._held = self._held[-len(CALL_END) + 1 :]
        return bool(found)

    def _whole(self, block: str, pieces: list[Piece]) -> bool:
        """Takes a call in one piece, in whatever order its fields come."""
        try:
            call: Any = json.loads(block)
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else dumps(arguments)
        pieces += [Called(self.calls, call["name"]), Arguments(self.calls, text)]
        self.calls += 1
        return True


def _undecided(text: str) -> int:
    """Characters at the end that may become a tag, with the white space before it, which belongs to neither."""
    for length in range(min(len(CALL_BEGIN) - 1, len(text)), -1, -1):
        if text.endswith(CALL_BEGIN[:length]):
            before = text[: len(text) - length]
            return len(text) - len(before.rstrip())
    raise AssertionError("every text ends with the empty one")


class _ObjectScanner:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int:
        """Takes more characters, and returns how many of them belong to the object."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.ended = True
                    return i + 1
        return len(text)
