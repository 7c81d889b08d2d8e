"""Stands for vLLM's server in its own environment: answers as it does, and tells what it was asked and started with.

Run with vLLM's options; it starts a process of its own, as vLLM does with its engine.
"""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STARTED = "started.jsonl"
"""In the working directory: a line for each instance."""
ASKED = "asked.jsonl"
"""And for each request."""


class Handler(BaseHTTPRequestHandler):
    """One token an event, of which the second has no text."""

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """Health."""
        self._begin()

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        port = self.connection.getsockname()[1]
        tell(ASKED, {"port": port, **body})
        self._begin()
        if not body.get("stream"):
            where = {"do_remote_prefill": True, "remote_port": port}
            self.wfile.write(json.dumps({"choices": [{"text": "a"}], "kv_transfer_params": where}).encode())
            return
        for index in range(body["max_tokens"]):
            self._event({"choices": [{"text": "" if index == 1 else "a", "token_ids": [7]}]})
        self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self) -> None:
        self.send_response(200)
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def tell(name: str, what: dict[str, Any]) -> None:
    """Appends a line."""
    with Path(os.environ["STUB_FOLDER"], name).open("a") as file:
        file.write(json.dumps(what) + "\n")


def main() -> None:
    """Serves until it is ended."""
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    names = ("OMP_NUM_THREADS", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_CPU_KVCACHE_SPACE")
    environment = {name: os.environ.get(name) for name in names}
    tell(STARTED, {"pids": [os.getpid(), child.pid], "options": sys.argv[1:], "environment": environment})
    with ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
