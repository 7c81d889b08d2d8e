"""Token ids to text while they arrive: no half characters, and together the same text as decoding all ids at once.

A token may end within a character, and decoding it yields U+FFFD until the rest has come. Decoding looks back over a
short window only, so that a token costs the same however long the text is.
"""

from collections.abc import Callable, Collection

_REPLACEMENT = "\ufffd"
_CHARACTER_BYTES_MAX = 4
"""UTF-8; so no more tokens than this make one character, and bytes older than this will never become one."""
_WINDOW_TOKENS = 2 * _CHARACTER_BYTES_MAX
_SILENT_TOKENS_MAX = 64
"""Tokens without text that the window keeps: one may be a space that only shows when something follows."""


class Detokenizer:
    """Text of one sequence.

    Args:
        decode: text of a list of ids.
        skipped: ids that have no text (special tokens).
    """

    def __init__(self, decode: Callable[[list[int]], str], skipped: Collection[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        self._window: list[int] = []
        self._settled = 0
        """Tokens at the start of the window whose text is out; they give the others their context."""
        self._shown = 0
        """Characters of the window's text that are out."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return self._push_incomplete(text)
        fresh = text[self._shown :]
        if fresh:
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._shown = len(self._decode(self._window))
        elif len(self._window) > _SILENT_TOKENS_MAX:
            self._window.pop()
        return fresh

    def _push_incomplete(self, text: str) -> str:
        if len(self._window) - self._settled < _CHARACTER_BYTES_MAX:
            return ""
        # Too many bytes for one character: they are broken, and only the last few can still become a whole one.
        broken = len(text) - len(text.rstrip(_REPLACEMENT))
        end = len(text) - min(broken, _CHARACTER_BYTES_MAX - 1)
        fresh = text[self._shown : end]
        self._window = self._window[-_WINDOW_TOKENS:]
        self._settled = len(self._window) - (_CHARACTER_BYTES_MAX - 1)
        self._shown = len(self._decode(self._window)) - (len(text) - max(end, self._shown))
        return fresh

    def flush(self) -> str:
        """The rest, when nothing follows any more: incomplete characters come out as U+FFFD."""
        rest = self._decode(self._window)[self._shown :]
        self._window, self._settled, self._shown = [], 0, 0
        return rest
