"""One server process of vLLM, from another environment, and those that it starts."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import httpx

from zipserve.bench import report
from zipserve.bench.cores import descendants, pin, yield_when_polling
from zipserve.bench.engine.vllm import environment
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import ModelFiles

_KV_BYTES = 1 << 30
_CONTEXT_TOKENS = 1024
_BLOCK_TOKENS = 128
_START_S = 600.0
_STOP_S = 30.0
_LOOK_S = 0.25
_LOG_CHARACTERS = 3000
_TRANSFER = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'


class Instance:
    """Runs while the context is open."""

    def __init__(
        self,
        python: Path,
        files: ModelFiles,
        cores: Sequence[int],
        *,
        chunk_tokens: int,
        sequences: int,
        transfers: bool,
    ) -> None:
        """
        Args:
            python: the interpreter of the environment that has vLLM.
            cores: those that it computes on.
            chunk_tokens: most tokens of a step.
            sequences: most at once.
            transfers: whether it gives KV to others, and fetches it from them.
        """
        port, side_port = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._cores = cores
        self._transfers = transfers
        self._command = [
            str(python), "-P", "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(files.folder), "--host", "127.0.0.1", "--port", str(port),
            "--dtype", "float32", "--distributed-executor-backend", "uni", "--enable-prefix-caching",
            "--block-size", str(_BLOCK_TOKENS), "--max-num-seqs", str(sequences),
            "--max-model-len", str(_CONTEXT_TOKENS), "--max-num-batched-tokens", str(chunk_tokens),
            *(["--kv-transfer-config", _TRANSFER] if transfers else []),
        ]  # fmt: skip
        self._environment = {
            **environment(python, len(cores), _KV_BYTES),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
        }

    def __enter__(self) -> "Instance":
        """Starts it, and waits until it answers: a minute, or three the first time, when it compiles.

        Raises:
            InvalidRequestError: it does not start; the message has the end of its log.
        """
        with ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile("w+"))
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,  # Ctrl-C is for us, who end it
                )
            except OSError as error:
                raise InvalidRequestError(f"cannot run {self._command[0]}: {error}", field="rival-python") from error
            stack.callback(self._stop)
            self._until_ready()
            self._settle()
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def _settle(self) -> None:
        """Keeps what computes on its cores, which it has left by itself; the server in front of it runs wherever there
        is room, as others' do. The thread of NIXL that polls without end gets what nobody else needs."""
        for process in descendants(self._process.pid):
            pin(process, self._cores)
        if self._transfers:
            polling = [thread for process in descendants(self._process.pid) for thread in yield_when_polling(process)]
            report.progress(f"vLLM on {self.url}: {len(polling)} threads poll, at low priority from now on")

    def _until_ready(self) -> None:
        end_s = time.monotonic() + _START_S
        with httpx.Client(base_url=self.url) as client:
            while time.monotonic() < end_s:
                if (status := self._process.poll()) is not None:
                    raise InvalidRequestError(f"vLLM ended with status {status}:\n{self._told()}", field="rival-python")
                with suppress(httpx.HTTPError):
                    if client.get("/health").status_code == httpx.codes.OK:
                        return
                time.sleep(_LOOK_S)
        raise InvalidRequestError(f"vLLM is not ready after {_START_S:g} s:\n{self._told()}", field="rival-python")

    def _told(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_LOG_CHARACTERS:]

    def _stop(self) -> None:
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        finally:  # its engine too, which outlives it if it has crashed
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
