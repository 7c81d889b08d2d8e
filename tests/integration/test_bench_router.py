"""`zipserve bench router` with a real router process before real stub workers, as small as it gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import router_model


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_all_parts(tmp_path: Path) -> None:
    model = router_model.write(tmp_path / "tiny", context_tokens=8192)
    command = [sys.executable, "-P", "-m", "zipserve.bench", "router", "--quick", "--json", "--model", str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=140)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [check["name"] for check in found["checks"]] == [
        "added to the first token, p50 [ms]",
        "added to the first token, p99 [ms]",
        "tokens/s (gRPC)",
        "tokens per second of its CPU (gRPC)",
        "tokens/s (HTTP)",
        "tokens per second of its CPU (HTTP)",
        "growth of memory",
    ]
    assert 0 < found["latency"]["p50_s"] < found["latency"]["p99_s"]
    assert min(found["throughput"]["tokens_per_s"], found["http"]["tokens_per_s"]) > 100
    assert found["memory"]["after"] > 0
