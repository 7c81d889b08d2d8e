"""What `up` tells on stderr: lines, and on a terminal one line below them that is written again and again."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from zipserve.cli.supervisor import Child, Death


class Console:
    """Writes to a stream; a stream that has gone away is no reason to stop."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._status = ""

    def line(self, text: str = "") -> None:
        """Writes lines that stay."""
        self._write(f"\r\x1b[K{text}\n{self._status}" if self._status else f"{text}\n")

    def status(self, text: str) -> None:
        """Replaces the line that changes; empty removes it. Nothing happens where there is no terminal."""
        if self.is_terminal and text != self._status:
            self._status = text[: shutil.get_terminal_size().columns - 1]
            self._write(f"\r\x1b[K{self._status}")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def progress(children: Iterable[Child], elapsed_s: float) -> str:
    """Which children are ready, in one line."""
    marks = " ".join(f"{child.spec.name}{' ✓' if child.ready else '…'}" for child in children)
    return f"{elapsed_s:4.0f} s  {marks}"


def summary(children: Iterable[Child]) -> list[str]:
    """A table of all processes."""
    rows = [("process", "address", "pid", "log")]
    for child in children:
        pid = str(child.process.pid) if child.process else "–"
        rows.append((child.spec.name, child.address or "–", pid, str(child.log)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def obituary(death: Death) -> list[str]:
    """A death, its last log lines, and what happens now."""
    name = death.child.spec.name
    head = f"{name} (pid {death.pid}) {death.how} after {death.lived_s:.1f} s"
    then = "given up" if death.restart_in_s is None else f"starts again in {death.restart_in_s:g} s"
    return [f"{head}: {then}", *(f"  {name} | {line}" for line in death.log_tail), f"  {name} | log: {death.child.log}"]
