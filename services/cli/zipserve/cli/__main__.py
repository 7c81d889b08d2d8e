"""`zipserve COMMAND`, also `python -m zipserve.cli COMMAND`. Commands are imported when they are run."""

import importlib
import os
import sys
from collections.abc import Sequence

from zipserve.cli import parser

_INTERRUPTED = 128 + 2
_PIPE_CLOSED = 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. `arguments` None: the process's own."""
    options = parser.build().parse_args(arguments)
    command = importlib.import_module(f"zipserve.cli.{options.command}")
    try:
        status: int = command.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; the reader, such as `head`, has gone on purpose.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return status


if __name__ == "__main__":
    sys.exit(main())
