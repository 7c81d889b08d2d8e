"""`python -m zipserve.decode`: settings, service, serve until a signal."""

from zipserve.common.rpc.server import run
from zipserve.decode.config import DecodeSettings
from zipserve.decode.service import DecodeService


def main() -> None:
    settings = DecodeSettings.load()
    run("decode", DecodeService(settings), settings)


if __name__ == "__main__":
    main()
