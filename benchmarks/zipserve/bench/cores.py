"""Processes on cores of their own, as if each had a machine or a device for itself."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_POLLING_SHARE = 0.5
_AT_LOW_PRIORITY = 10


def pin(pid: int, cores: Iterable[int]) -> None:
    """Keeps all threads of a process on some cores; those that it starts later inherit it."""
    wanted = set(cores)
    pinned: set[int] = set()
    while left := set(_threads(pid)) - pinned:  # until there is none that a thread started meanwhile
        for thread in left:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, wanted)
        pinned |= left


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and these, and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def command(pid: int) -> list[str]:
    """The command line of a process; empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    return []


def yield_when_polling(pid: int, watch_s: float = 1.0) -> list[int]:
    """Gives low priority to threads of an idle process that keep a core busy though there is nothing to do.

    Returns:
        Their ids.
    """
    before = dict(_cpu_s(pid))
    time.sleep(watch_s)
    polling = [
        thread
        for thread, seconds in _cpu_s(pid)
        if thread in before and seconds - before[thread] > _POLLING_SHARE * watch_s
    ]
    for thread in polling:
        os.setpriority(os.PRIO_PROCESS, thread, _AT_LOW_PRIORITY)
    return polling


def _threads(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            yield int(thread.name)


def _cpu_s(pid: int) -> Iterator[tuple[int, float]]:
    for thread in _threads(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
            yield thread, (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
