"""`zipserve up`: a whole stack on this machine, as separate processes, until Ctrl-C.

Here: what has to be settled before the first of them starts.
"""

import argparse
import asyncio
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

from zipserve.cli import plan, redis_server
from zipserve.cli.console import Console
from zipserve.cli.generate import explain
from zipserve.cli.lifecycle import Lifecycle, Once, Setup
from zipserve.cli.parser import DEFAULT_ADDRESS, DEFAULT_HTTP_ADDRESS, DEFAULT_PROMPT
from zipserve.common import log, models, stack_file
from zipserve.common.errors import ZipserveError

_ONCE_TOKENS = 64


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    console = Console(sys.stderr)
    if (options.prompt or options.max_tokens) and not options.once:
        console.line("zipserve: --prompt and --max-tokens need --once")
        return 2
    try:
        listen = _listen_address(options.listen or ("127.0.0.1:0" if options.once else DEFAULT_ADDRESS))
        http_listen = _http_address(options.http, once=options.once)
        log.configure(level="error", style="console")
        # until the event loop takes over: SIGTERM ends a conversion as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        model = _model(options.model or models.DEFAULT_MODEL, console)
        log_dir = _log_dir(options.log_dir)
        setup = _setup(options, listen, http_listen, model, log_dir)
        _tell_where(setup)
    except ZipserveError as error:
        console.line(explain(error))
        return 1
    except (OSError, redis_server.NoRedisError) as error:
        console.line(f"zipserve: {error}")
        return 1
    console.line(f"logs in {log_dir}")
    try:
        status = asyncio.run(Lifecycle(setup, console).run())
    finally:
        (log_dir / stack_file.STACK_FILE).unlink(missing_ok=True)
    if status == 1:
        console.line(f"logs are kept in {log_dir}")
    elif not options.log_dir:
        shutil.rmtree(log_dir, ignore_errors=True)
    return status


def _model(model: str, console: Console) -> str:
    """Makes sure that the model is there before several workers look for it; returns its name for them."""
    if model == models.DEFAULT_MODEL and not models.default_folder().is_dir():
        console.line(f"converting the default model into {models.default_folder()}: once, about 40 s")
    files = models.resolve(model)
    console.line(f"model {files.name}, revision {files.revision[:12]}")
    is_folder = model != models.DEFAULT_MODEL and Path(model).expanduser().is_dir()
    return str(files.folder) if is_folder else model


def _log_dir(wish: str | None) -> Path:
    if wish is None:
        return Path(tempfile.mkdtemp(prefix="zipserve-"))
    folder = Path(wish).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _setup(options: argparse.Namespace, listen: str, http_listen: str, model: str, log_dir: Path) -> Setup:
    redis, redis_url = None, options.redis
    if redis_url is None:
        port, password = int(_listen_address("127.0.0.1:0").rpartition(":")[2]), secrets.token_hex(24)
        redis, redis_url = redis_server.spec(port, password, log_dir), redis_server.url(port, password)
    stack = plan.Stack(
        prefill=options.prefill,
        decode=options.decode,
        model=model,
        listen=listen,
        http_listen=http_listen,
        cluster=options.cluster or f"up-{secrets.token_hex(4)}",
        redis_url=redis_url,
        secret=secrets.token_hex(32),
        drain_s=options.drain,
        threads=options.threads,
        kv_blocks=options.kv_blocks,
        codec=options.codec,
        overrides=tuple(options.overrides),
    )
    return Setup(
        stack=stack,
        redis=redis,
        log_dir=log_dir,
        start_timeout_s=options.start_timeout,
        router=dial_address(listen),
        http=dial_address(http_listen) if http_listen else "",
        once=Once(options.prompt or DEFAULT_PROMPT, options.max_tokens or _ONCE_TOKENS) if options.once else None,
    )


def _http_address(wish: str | None, *, once: bool) -> str:
    """Where the HTTP API listens; empty: nowhere. Only an address that was asked for must be free."""
    if wish is not None:
        return _listen_address(wish)
    if once:
        return ""
    try:
        return _listen_address(DEFAULT_HTTP_ADDRESS)
    except OSError:
        return _listen_address("127.0.0.1:0")


def _tell_where(setup: Setup) -> None:
    """For `zipserve top` and `zipserve profile`."""
    stack = setup.stack
    stack_file.write(setup.log_dir, stack.redis_url, stack.cluster, stack.secret)


def _listen_address(listen: str) -> str:
    """host:port with a free port in the place of 0.

    Raises:
        OSError: the port is taken, or the host is not ours.
    """
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise OSError(f"cannot listen on {listen}: {error.strerror}") from error
        return f"{host}:{probe.getsockname()[1]}"


def dial_address(listen: str) -> str:
    """Where a server that listens there is reached from this machine."""
    host, _, port = listen.rpartition(":")
    local = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  nothing is bound here
    return f"{local.get(host, host)}:{port}"
