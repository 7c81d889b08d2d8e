"""The id of a request in logs, traces and metrics of every hop."""

import re
import uuid

_GIVEN = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(given: object) -> str:
    """The client's id where it is a printable word of at most 128 characters, else a new one."""
    return given if isinstance(given, str) and _GIVEN.fullmatch(given) else uuid.uuid4().hex
