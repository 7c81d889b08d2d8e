"""`python -m zipserve.planner …`, also `zipserve plan …`."""

import sys
from collections.abc import Sequence

from zipserve.common.errors import ZipserveError
from zipserve.planner import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 with a plan, 2 if there is none. `arguments` None: the process's own."""
    options = command.parser().parse_args(arguments)
    try:
        return command.run(options)
    except ZipserveError as error:
        sys.stderr.write(f"zipserve plan: {error.message}\n")
    except OSError as error:
        sys.stderr.write(f"zipserve plan: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
