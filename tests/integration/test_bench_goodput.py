"""`zipserve bench goodput` with real stacks of a tiny model, as small as it gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_arrangements_side_by_side(tiny_model: Path, tmp_path: Path) -> None:
    plan, trace, saved = tmp_path / "plan.json", tmp_path / "trace.csv", tmp_path / "all.json"
    plan.write_text('{"name": "small steps", "prefill": 0, "decode": 1, "settings": {"decode.step_tokens": 64}}')
    rows = "".join(f"{index},{100 + 10 * index},4\n" for index in range(6))
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    command = [sys.executable, "-P", "-m", "zipserve.bench", "goodput", "--quick", "--json", "--model", str(tiny_model),
               "--arrangements", "apart:threads=1", "--plan", str(plan), "--workload", str(trace), "--rates", "10",
               "--save", str(saved)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [(name, of["devices"]) for name, of in found["arrangements"].items()] == [
        ("apart:threads=1", 2),
        ("small steps", 1),
    ]
    for of in json.loads(saved.read_text())["arrangements"].values():
        (only,) = of["runs"]
        assert (only["rate"], only["requests"], only["failed"]) == (10.0, 4, 0)
        assert [one["tokens"] for one in only["each"]] == [4] * 6
        assert [one["counted"] for one in only["each"]] == [False, True, True, True, True, False]
        assert all(0 < one["ttft_ms"] < one["e2e_ms"] for one in only["each"])
        assert all(max(one["gaps_ms"]) == one["largest_gap_ms"] for one in only["each"])
    assert all(check["met"] for check in found["checks"] if check["decides"])
