"""`zipserve bench prefix` with real stacks of the real model, as small as it gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_all_parts(smollm2: Path) -> None:
    command = [sys.executable, "-P", "-m", "zipserve.bench", "prefix", "--quick", "--json", "--codecs", "zip-4/32",
               "--model", str(smollm2)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    elsewhere, pressure = found["workloads"]["elsewhere, zip-4/32"], found["workloads"]["pressure"]
    assert [answer["cached_tokens"] for answer in (*elsewhere["first"], *elsewhere["second"])] == [0, 256]
    assert elsewhere["fetched_blocks"] == 2
    assert [answer["cached_tokens"] for answer in found["workloads"]["chat"]] == [0, 128, 128]
    # at once, a worker of so few slabs may have given a block up before the store came for it
    assert sum(answer["cached_tokens"] for answer in pressure["again"]) >= 2 * 256
    assert [answer["cached_tokens"] for answer in pressure["recomputed"]] == [0] * 4
    assert pressure["promoted_blocks"] >= 1
