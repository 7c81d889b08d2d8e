"""`python -m zipserve.kvstore`: settings, service, serve until a signal."""

from zipserve.common.rpc.server import run
from zipserve.kvstore.config import KvStoreSettings
from zipserve.kvstore.service import KvStoreService


def main() -> None:
    settings = KvStoreSettings.load()
    run("kvstore", KvStoreService(settings), settings)


if __name__ == "__main__":
    main()
