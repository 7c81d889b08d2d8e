"""`python -m zipserve.router`: serves until SIGTERM."""

from zipserve.common.rpc.server import run
from zipserve.router.config import RouterSettings
from zipserve.router.service import RouterService


def main() -> None:
    """Reads the settings and runs the service."""
    settings = RouterSettings.load()
    run("router", RouterService(settings), settings)


if __name__ == "__main__":
    main()
