"""Server-sent events, written by hand: a stream sends one for each token, and this is most of what the HTTP side does
for it.
"""

from typing import Any

from zipserve.router.http.answer import Head
from zipserve.router.http.fields import dumps

DONE = b"data: [DONE]\n\n"


class Frames:
    """The chunks of one stream, which differ in their choices only.

    Args:
        tells_usage: a last chunk tells the counted tokens; the others say that they do not.
    """

    def __init__(self, head: Head, kind: str, *, tells_usage: bool) -> None:
        self._begin = f'data: {dumps(head.fields(kind))[:-1]},"choices":['
        self._end = '],"usage":null}\n\n' if tells_usage else "]}\n\n"

    def choice(self, choice: str) -> bytes:
        """A chunk with one choice, which is JSON."""
        return f"{self._begin}{choice}{self._end}".encode()

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk with no choice."""
        return f'{self._begin}],"usage":{dumps(usage)}}}\n\n'.encode()


def error_event(body: dict[str, object]) -> bytes:
    """What a stream ends with that failed."""
    return f"data: {dumps(body)}\n\n".encode()
