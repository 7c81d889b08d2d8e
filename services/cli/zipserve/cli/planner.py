"""`zipserve plan …`, `zipserve profile …`: runs the planner as a process of its own, because it loads what the client
does not."""

import argparse
import importlib.util
import subprocess
import sys


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the planner's exit status."""
    if importlib.util.find_spec("zipserve.planner") is None or importlib.util.find_spec("numba") is None:
        sys.stderr.write("zipserve: this installation has no planner; install zipserve[planner]\n")
        return 2
    # -P: `python -m` would put the working directory on the path, where transformers takes kernels/ for a package.
    command = [sys.executable, "-P", "-m", options.module, *options.arguments]
    status = subprocess.run(command, check=False).returncode
    return status if status >= 0 else 128 - status
