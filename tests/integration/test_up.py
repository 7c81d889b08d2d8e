"""The main job from the command line: one command answers a real prompt with the default model."""

import asyncio
import os
import re
import sys
from pathlib import Path


async def test_up_once_answers_a_real_prompt(smollm2: Path, tmp_path: Path) -> None:
    assert (smollm2 / "model.safetensors").exists()
    zipserve = Path(sys.executable).with_name("zipserve")
    process = await asyncio.create_subprocess_exec(
        zipserve,
        "up",
        "--once",
        "--log-dir",
        tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, told = (part.decode() for part in await asyncio.wait_for(process.communicate(), 110))
    assert process.returncode == 0, told
    assert output.strip() == "The capital of France is Paris."
    assert re.search(r"TTFT [\d.]+ m?s, TPOT [\d.]+ m?s", told), told
    assert re.search(r"KV over NIXL: 444128 bytes .* pulled and verified in", told), told
    pids = [int(pid) for pid in re.findall(r"^  \S+ +\S+:\d\S* +(\d+) ", told, re.MULTILINE)]
    assert len(pids) == 5
    assert not [pid for pid in pids if str(pid) in os.listdir("/proc")], "a process was left behind"
