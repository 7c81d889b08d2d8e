"""`zipserve bench engine` with real stacks: a tiny model, streams beside a prompt, start-up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zipserve.bench.stack import Stack
from zipserve.common.errors import InternalError


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["apart", "colocated"])
def test_stack(stack: str, tiny_model: Path) -> None:
    command = [sys.executable, "-P", "-m", "zipserve.bench", "engine", "--quick", "--json", "--parts", stack,
               "--model", str(tiny_model)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    measured = found["stacks"][stack]
    assert 0 < measured["quiet_median_s"] <= measured["quiet_p99_s"]
    assert 0 < measured["beside_prompt_median_s"] <= measured["beside_prompt_max_s"]
    assert len(measured["first_token_s"]) == 1
    workers = {name for name in measured["ready_s"] if name.startswith(("prefill", "decode"))}
    assert workers == ({"decode-0"} if stack == "colocated" else {"prefill-0", "decode-0"})
    assert [check["name"].partition(":")[0] for check in found["checks"]] == [stack] * len(found["checks"])


def test_stack_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"has no config\.json"), Stack(["--model", str(tmp_path)]):
        pass
