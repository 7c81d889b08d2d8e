"""Stop strings over a stream of text: holds back what may become one, cuts where one is complete.

The result does not depend on where the stream is cut into pieces: the first stop string to be completed wins, and of
those that complete with the same character the longest.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Released(NamedTuple):
    """What one piece of text let go."""

    text: str
    """Text that is certainly not part of a stop string."""
    stop: str | None
    """The stop string that was completed; nothing may be fed after it."""


class StopMatcher:
    """Feeds on text and releases it, up to the first stop string."""

    def __init__(self, stops: Iterable[str]) -> None:
        # longest first: it is the one that decides when several complete together
        self._patterns = [_Pattern(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""

    def feed(self, text: str) -> Released:
        """Takes the next piece and returns what is safe to show."""
        if not self._patterns:
            return Released(text, None)
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            # every pattern advances, also after a match: none may miss a character
            complete = [pattern.text for pattern in self._patterns if pattern.advance(character)]
            if complete:
                self._held = ""
                return Released(buffer[: end - len(complete[0])], complete[0])
        safe = len(buffer) - max(pattern.matched for pattern in self._patterns)
        self._held = buffer[safe:]
        return Released(buffer[:safe], None)

    def flush(self) -> str:
        """The text still held back, when nothing follows any more."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """One stop string, matched character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Characters of `text` that the stream ends with now; fewer than all."""
        self._borders = _borders(text)

    def advance(self, character: str) -> bool:
        """Takes one character; True when it completes the text."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self.text[self.matched] == character:
            self.matched += 1
        if self.matched < len(self.text):
            return False
        self.matched = self._borders[-1]
        return True


def _borders(text: str) -> list[int]:
    """For every prefix of a text, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        if text[i] == text[length]:
            length += 1
        borders[i] = length
    return borders
