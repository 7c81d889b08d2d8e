"""`python -m zipserve.prefill`: settings, service, serve until a signal."""

from zipserve.common.rpc.server import run
from zipserve.prefill.config import PrefillSettings
from zipserve.prefill.service import PrefillService


def main() -> None:
    settings = PrefillSettings.load()
    run("prefill", PrefillService(settings), settings)


if __name__ == "__main__":
    main()
