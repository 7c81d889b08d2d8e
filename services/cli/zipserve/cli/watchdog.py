"""Ends what a supervisor leaves behind, even when the supervisor is killed by SIGKILL.

The watchdog leads a process group that all children join. It reads a pipe whose other end only the supervisor holds: at
its end, the supervisor is gone, and the watchdog ends the group, politely first. Children hold the write end of a
second pipe, which tells when the last of them has left. Works on any POSIX system, needs no record of process ids, and
keeps Ctrl-C in the terminal away from the children, which the supervisor wants to stop in order.
"""

import os
import select
import signal
import subprocess
import sys
from types import TracebackType

GRACE_S = 10.0


class Watchdog:
    """The supervisor's side: starts the process; leaving the context ends the group and the watchdog itself."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self.life_fd = -1
        """To be inherited by every child, and by nobody else."""

    def __enter__(self) -> "Watchdog":
        life_read, self.life_fd = os.pipe()
        # -I -S: starts within milliseconds and depends on nothing that an environment could break.
        command = [sys.executable, "-I", "-S", __file__, str(life_read), str(self._grace_s)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(life_read,), process_group=0
            )
        finally:
            os.close(life_read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        os.close(self.life_fd)
        self._process.stdin.close()
        try:
            self._process.wait(self._grace_s + 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The watchdog's process; its id is also the id of the group."""
        assert self._process is not None
        return self._process


def _watch(life_fd: int, grace_s: float) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 64):
        pass
    os.killpg(0, signal.SIGTERM)
    select.select([life_fd], [], [], grace_s)
    os.killpg(0, signal.SIGKILL)  # ourselves too


if __name__ == "__main__":
    if os.getpgrp() == os.getpid():  # never somebody else's group
        _watch(int(sys.argv[1]), float(sys.argv[2]))
