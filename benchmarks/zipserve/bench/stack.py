"""A whole stack of real processes, started by `zipserve up` as a user starts it."""

import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from zipserve.bench import cores
from zipserve.common.errors import InternalError

COLOCATED = ("--prefill", "0", "--decode", "1")
APART = ("--prefill", "1", "--decode", "1")
_READY = re.compile(r"\s*([\d.]+) s (\S+) is ready \(")
_ALL_READY = re.compile(r"ready after ([\d.]+) s, router on (\S+)")
_ID = "--worker-id="
_STOP_S = 60.0
_TOLD_LINES = 20


class Stack:
    """Runs while the context is open."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """
        Args:
            arguments: of `zipserve up`.
        """
        self._arguments = arguments
        self._told: deque[str] = deque(maxlen=_TOLD_LINES)
        self.ready_s: dict[str, float] = {}
        """Seconds from the start of `zipserve up`, which starts Redis first, until each process was ready."""
        self._listener: threading.Thread | None = None
        self.address = ""
        """host:port of the router."""
        self.log_dir = Path()
        """Where each process logs to a file of its name."""

    def __enter__(self) -> "Stack":
        """
        Raises:
            InternalError: it did not start; the message has what it said last.
        """
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="zipserve-bench-"))
            self.log_dir = Path(folder)
            command = [sys.executable, "-P", "-m", "zipserve.cli", "up", "--listen", "127.0.0.1:0", "--log-dir", folder]
            self._process = stack.enter_context(
                subprocess.Popen(
                    [*command, *self._arguments], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
                )
            )
            stack.callback(self._stop)
            self._listen()
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def workers(self) -> dict[str, int]:
        """The processes of all services, by their ids."""
        marked = ((pid, argument) for pid in cores.descendants(self._process.pid) for argument in cores.command(pid))
        return {argument.removeprefix(_ID): pid for pid, argument in marked if argument.startswith(_ID)}

    def _listen(self) -> None:
        """Reads what it says until everything is ready, and leaves the rest to a thread."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._told.append(line)
            if ready := _READY.match(line):
                self.ready_s[ready[2]] = float(ready[1])
            elif ready := _ALL_READY.match(line):
                self.address = ready[2]
                self._listener = threading.Thread(target=self._told.extend, args=(self._process.stderr,), daemon=True)
                self._listener.start()
                return
        status = self._process.wait()
        raise InternalError(f"zipserve up ended with status {status}:\n{''.join(self._told)}")

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its watchdog ends the others
            self._process.wait()
        if self._listener is not None:
            self._listener.join()
