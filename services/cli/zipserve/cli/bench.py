"""`zipserve bench NAME`: runs a benchmark as a process of its own, because benchmarks load what the client does not."""

import argparse
import importlib.util
import subprocess
import sys


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the benchmark's exit status."""
    if importlib.util.find_spec("zipserve.bench") is None:
        sys.stderr.write("zipserve: this installation has no benchmarks\n")
        return 2
    # -P: `python -m` would put the working directory on the path, where transformers takes kernels/ for a package.
    name = [options.name] if options.name else []
    command = [sys.executable, "-P", "-m", "zipserve.bench", *name, *options.arguments]
    status = subprocess.run(command, check=False).returncode
    return status if status >= 0 else 128 - status
