"""`zipserve bench transfer` with real processes, real NIXL over shared memory and TCP, and real leases."""

import json
import subprocess
import sys

import pytest

from zipserve.bench.transfer.bars import WAYS


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_quick_run(transport: str) -> None:
    command = [sys.executable, "-P", "-m", "zipserve.bench", "transfer", "--quick", "--json",
               "--transports", transport, "--blocks", "1", "4", "--codecs", "zip-4/32"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [one["tokens"] for one in found["moved"]] == [128, 512, 4000]
    for one in found["moved"]:
        assert set(one["timings"]) == set(WAYS)
        assert 0 < one["timings"]["transfer"]["median_s"] < one["timings"]["pull"]["median_s"]
    transfer, pull, size = found["checks"]
    assert (transfer["decides"], pull["decides"], size["decides"]) == (False, False, True)
    assert size["value"] > 4.4
