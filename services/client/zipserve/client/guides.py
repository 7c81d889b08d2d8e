"""What an output must look like: values for the parameter `guide`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from zipserve.v1.sampling_pb2 import Guide, GuideChoices

JSON_OBJECT = Guide(json_object=True)
"""Any JSON object."""


def json_schema(schema: Mapping[str, Any] | str) -> Guide:
    """A JSON value that fits a JSON Schema."""
    return Guide(json_schema=schema if isinstance(schema, str) else json.dumps(schema))


def regex(pattern: str) -> Guide:
    """A text that matches a regular expression as a whole (Rust's syntax, no look-around)."""
    return Guide(regex=pattern)


def choices(texts: Sequence[str]) -> Guide:
    """One of these texts."""
    return Guide(choices=GuideChoices(texts=texts))


def grammar(text: str) -> Guide:
    """A text of a grammar in Lark's syntax."""
    return Guide(grammar=text)
