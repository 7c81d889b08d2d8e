"""`zipserve top`: what a cluster does now, written again and again, or once for scripts."""

import argparse
import asyncio
import json
import shutil
import sys
from contextlib import AsyncExitStack

from zipserve.cli import lookout
from zipserve.cli.board import Board, board, lines

_CLEAR = "\x1b[H\x1b[J"


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    try:
        return asyncio.run(_run(options))
    except ImportError as error:
        sys.stderr.write(
            f"zipserve: reading the registry needs more than a client ({error}): pip install 'zipserve[service]', "
            "or name the services with --metrics HOST:PORT\n"
        )
    except (OSError, ValueError) as error:
        sys.stderr.write(f"zipserve: {error}\n")
    return 1


async def _run(options: argparse.Namespace) -> int:
    write = _json if options.json else _text if options.once else _screen
    async with AsyncExitStack() as stack:
        look = await _lookout(options, stack)
        before = await look()
        while True:
            await asyncio.sleep(options.interval)
            now = await look()
            if options.once and not now.processes:
                raise ValueError("nobody is there: the registry shows no process of this cluster")
            write(board(before, now))
            if options.once:
                return 0
            before = now


async def _lookout(options: argparse.Namespace, stack: AsyncExitStack) -> lookout.Lookout:
    if options.metrics:
        return lookout.of_addresses(options.metrics)
    known = lookout.stack_of(options.log_dir) if options.log_dir else {}
    asked = {"redis_url": options.redis, "cluster": options.cluster}
    return await lookout.of_cluster(stack, **known, **{key: value for key, value in asked.items() if value})


def _json(board: Board) -> None:
    print(json.dumps(board.as_dict()), flush=True)


def _text(board: Board) -> None:
    print("\n".join(lines(board)))


def _screen(board: Board) -> None:
    size = shutil.get_terminal_size()
    shown = [line[: size.columns - 1] for line in lines(board)[: size.lines - 1]]
    sys.stdout.write(_CLEAR + "\n".join(shown) + "\n")
    sys.stdout.flush()
