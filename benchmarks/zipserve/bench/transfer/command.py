"""`zipserve bench transfer`: its options, and the run from processes to bars."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from zipserve.bench import report
from zipserve.bench.timing import Timing
from zipserve.bench.transfer import bars
from zipserve.bench.transfer.bars import Moved
from zipserve.common.errors import InternalError
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC, Layout

TRANSPORTS: dict[str, dict[str, str]] = {"shm": {}, "tcp": {"UCX_TLS": "tcp"}}
"""Settings of UCX. Left to itself it reads a neighbour's memory directly."""
SEQUENCE_TOKENS = 4000


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("transfer", "KV pulls between two processes, beside raw NIXL and memcpy.")
    number = report.whole(1)
    options.add_argument(
        "--codecs", nargs="+", choices=CODECS, default=[DEFAULT_CODEC], help=f"default: {DEFAULT_CODEC}"
    )
    options.add_argument(
        "--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS), help="of UCX (default: shm tcp)"
    )
    options.add_argument(
        "--blocks", nargs="+", type=number, metavar="N", help="in a pull (default: 1 2 4 8 16 32 64; quick: 1 4)"
    )
    options.add_argument("--block-tokens", type=number, default=128, metavar="N", help="of a block (default: 128)")
    options.add_argument("--rounds", type=number, metavar="N", help="of turns (default: 50; quick: 3)")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status.

    Raises:
        InternalError: a process failed, as it does if what it read is not what was sealed.
    """
    counts = options.blocks or ((1, 4) if options.quick else (1, 2, 4, 8, 16, 32, 64))
    rounds = options.rounds or (3 if options.quick else 50)
    layouts = {codec: _layout(codec, options.block_tokens) for codec in options.codecs}
    lengths = list(dict.fromkeys([*(count * options.block_tokens for count in counts), SEQUENCE_TOKENS]))
    moved = [
        one
        for transport in options.transports
        for layout in layouts.values()
        for one in _measure(transport, layout, lengths, rounds)
    ]
    print("GB/s: of the median, then of p90 and p10 of the seconds\n")
    print(bars.table(moved, layouts), end="\n\n")
    checks = bars.checks(moved, layouts, SEQUENCE_TOKENS, decides=not options.quick)
    return report.finish(
        "transfer", checks, device=report.cpu(1), as_json=options.json, moved=[asdict(one) for one in moved]
    )


def _layout(codec: str, block_tokens: int) -> Layout:
    """The default model's KV."""
    return Layout(
        model="SmolLM2-135M",
        revision="bench",
        layers=30,
        kv_heads=3,
        key_dim=64,
        value_dim=64,
        dtype="float32",
        codec=codec,
        block_tokens=block_tokens,
    )


def _measure(transport: str, layout: Layout, lengths: list[int], rounds: int) -> Iterator[Moved]:
    options = json.dumps({"layout": asdict(layout), "lengths": lengths, "rounds": rounds})
    command = [sys.executable, "-P", "-m", "zipserve.bench.transfer.reader", options]
    environment = {**os.environ, **TRANSPORTS[transport]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            timings = {way: Timing(**seconds) for way, seconds in found.pop("seconds").items()}
            report.progress(f"{layout.codec} over {transport}: {found['tokens']} tokens")
            yield Moved(transport, layout.codec, **found, timings=timings)
    if process.returncode:
        raise InternalError(f"reading {layout.codec} over {transport} ended with status {process.returncode}")
