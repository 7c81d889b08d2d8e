"""vLLM as a contestant: a process from another environment, with the settings that make it fast on a CPU.

Its process stays alive and idle between its turns. See `vllm_process.py` for its side.
"""

import ctypes.util
import json
import os
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from zipserve.bench import report
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import ModelFiles
from zipserve.kernels.native import cache_dir

_CHUNK_TOKENS = 1024
_SEQUENCES = 16
_LOG_CHARACTERS = 2000


class Vllm:
    """vLLM, compiled, float32, its engine in its own process; a context manager that ends it."""

    name = "vLLM"

    def __init__(
        self, python: Path, files: ModelFiles, *, threads: int, rows_max: int, context_tokens: int, kv_bytes: int
    ) -> None:
        """
        Args:
            python: the interpreter of the environment that has vLLM.
            rows_max, context_tokens: most sequences at once, and their longest.
            kv_bytes: for its KV cache.
        """
        self._command = [
            str(python), "-P", str(Path(__file__).with_name("vllm_process.py")), "--model", str(files.folder),
            "--rows", str(max(_SEQUENCES, rows_max)), "--context", str(context_tokens), "--chunk", str(_CHUNK_TOKENS),
        ]  # fmt: skip
        self._environment = environment(python, threads, kv_bytes)

    def __enter__(self) -> "Vllm":
        """Starts it, and waits until it is ready: a minute, or three the first time, when it compiles.

        Raises:
            InvalidRequestError: it does not start; the message has the end of its log.
        """
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile("w+"))
            pipe = subprocess.PIPE
            try:
                process = subprocess.Popen(
                    self._command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=self._environment
                )
            except OSError as error:
                raise InvalidRequestError(f"cannot run {self._command[0]}: {error}", field="rival-python") from error
            self._process = stack.enter_context(process)
            stack.callback(process.kill)
            self._answer()
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def hold(self, count: int, context: int) -> None:
        """See Contestant."""
        self._ask("hold", count, context)

    def steps(self, count: int) -> list[float]:
        """See Contestant."""
        return list(self._ask("steps", count))

    def drop(self) -> None:
        """See Contestant."""
        self._ask("drop")

    def prefill(self, tokens: int) -> float:
        """See Contestant."""
        return float(self._ask("prefill", tokens))

    def _ask(self, name: str, *arguments: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            told = self._log.read()[-_LOG_CHARACTERS:]
            raise InvalidRequestError(f"vLLM ended with status {status}:\n{told}", field="rival-python")
        return json.loads(line)


def preloaded(python: Path) -> dict[str, str | None]:
    """Libraries without which vLLM is slower on a CPU, for its environment's interpreter; None: not found."""
    openmp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    return {
        "tcmalloc": ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc"),
        "libiomp5": str(openmp) if openmp.exists() else None,
    }


def environment(python: Path, threads: int, kv_bytes: int) -> dict[str, str]:
    """Ours, without what would lead it to our packages, and with what vLLM wants on a CPU. Tells what it lacks."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    libraries = preloaded(python)
    for name, library in libraries.items():
        if library is None:
            report.progress(f"WARNING: vLLM runs without {name}, which is not found, and so slower than it can")
    return {
        **kept,
        "LD_PRELOAD": ":".join(filter(None, libraries.values())),
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "5",  # ms: its threads sleep soon after its turn
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(-(-kv_bytes >> 30) + 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_AOT_COMPILE": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir() / "rivals" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
