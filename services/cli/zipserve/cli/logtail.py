"""The end of a process's log, for people: JSON lines become short text, tracebacks stay as they are."""

import json
from pathlib import Path
from typing import Any

_TAIL_BYTES = 16 << 10
_LINE_CHARACTERS = 200
_HIDDEN = frozenset({"event", "level", "timestamp", "service", "worker_id", "exception"})


def tail(path: Path, offset: int, lines: int) -> list[str]:
    """The last lines that a log got since `offset`, readable; empty when there is no log."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            start = file.seek(max(offset, end - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    found = text.splitlines()
    if start > offset:
        found = found[1:]  # the first line is cut
    return [readable(line) for line in found if line.strip()][-lines:]


def readable(line: str) -> str:
    """One log line as short text."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or "event" not in entry:
        return _shorten(line.rstrip())
    words = [str(entry.get("level", "")), str(entry["event"])]
    words += [f"{key}={value}" for key, value in entry.items() if key not in _HIDDEN]
    words += [f"({error})" for error in _exceptions(entry.get("exception"))]
    return _shorten(" ".join(filter(None, words)))


def _exceptions(value: Any) -> list[str]:
    """structlog's tracebacks are a list of chained exceptions, each with its frames."""
    if not isinstance(value, list):
        return [str(value)] if value else []
    return [f"{item.get('exc_type')}: {item.get('exc_value')}" for item in value if isinstance(item, dict)]


def _shorten(text: str) -> str:
    return text if len(text) <= _LINE_CHARACTERS else text[: _LINE_CHARACTERS - 1] + "…"
