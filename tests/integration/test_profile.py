"""`zipserve profile` against real processes."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from processes import SECRET, Processes
from zipserve.planner.native.profile import WorkerProfile, load
from zipserve.planner.native.step_model import step_ms


async def profile(redis_url: str, cluster: str, *arguments: str) -> tuple[int, str]:
    """Runs it; exit status and what it told."""
    environment = {**os.environ, "ZIPSERVE_PROFILE_REDIS_URL": redis_url, "ZIPSERVE_PROFILE_SECRET": SECRET}
    command = (sys.executable, "-P", "-m", "zipserve.cli", "profile", "--cluster", cluster, *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.slow
async def test_a_cluster_is_profiled(redis_url: str, cluster: str, tiny_model: Path, tmp_path: Path) -> None:
    async with Processes(redis_url, tiny_model, tmp_path, cluster=cluster) as processes:
        await processes.start("prefill-0", "decode-0", "router")
        status, told = await profile(redis_url, cluster, "--quick", "--out", str(tmp_path / "made"))
        assert status == 0, told
        (path,) = (tmp_path / "made").iterdir()
        found: WorkerProfile = load(path)
        assert str(path) in told
        # nothing is served now: a live profile has nothing to say, unless an older one fills it in
        live = ("--live", "--seconds", "0.5", "--out", str(tmp_path / "again"))
        status, told = await profile(redis_url, cluster, *live)
        assert (status, "0 steps are no measure" in told) == (2, True), told
        status, told = await profile(redis_url, cluster, *live, "--base", str(path))
        assert status == 0, told
    assert found.measured
    assert found.link is not None
    assert found.link.bytes_per_s > 0
    assert found.overhead_ms is not None
    assert 0 < found.overhead_ms < 1000
    prefill, decode = found.role("prefill"), found.role("decode", mixes=True)
    assert prefill.steps > 100
    assert decode.steps > 100
    assert step_ms(prefill.step, 256, 256 * 257 // 2, 0, 0) > step_ms(prefill.step, 8, 36, 0, 0)
    assert step_ms(decode.step, 0, 0, 16, 16 * 200) > step_ms(decode.step, 0, 0, 1, 200)


async def test_a_cluster_without_workers(redis_url: str, cluster: str) -> None:
    status, told = await profile(redis_url, cluster, "--quick")
    assert status == 2
    assert f"no worker of cluster {cluster} is in the registry" in told
