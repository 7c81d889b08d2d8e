"""`python -m zipserve.planner.profiling …`, also `zipserve profile …`."""

import sys
from collections.abc import Sequence

from zipserve.common.errors import ZipserveError
from zipserve.planner.profiling import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 with a profile, 2 if there is none. `arguments` None: the process's own."""
    options = command.parser().parse_args(arguments)
    try:
        return command.run(options)
    except (ZipserveError, OSError, ValueError) as error:
        sys.stderr.write(f"zipserve profile: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
