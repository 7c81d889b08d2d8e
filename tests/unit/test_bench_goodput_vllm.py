"""vLLM's arrangements in `zipserve bench goodput`, before a stub of its server: who is asked what, how tokens are
counted, and that nothing is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stub_vllm
from polling import until
from zipserve.bench import cores
from zipserve.bench.engine.vllm import environment, preloaded
from zipserve.bench.goodput.vllm import Vllm
from zipserve.bench.serve.records import Record
from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import ModelFiles


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter whose vLLM is the stub."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    shutil.copy(stub_vllm.__file__, package / "api_server.py")
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nexport STUB_FOLDER="{tmp_path}" PYTHONPATH="{tmp_path}"\nexec "{sys.executable}" "$@"\n'
    )
    script.chmod(0o755)
    return script


def told(python: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (python.parent / name).read_text().splitlines()]


def a_vllm(text: str, python: Path) -> Vllm:
    return Vllm.parse(text, python, ModelFiles("m", Path("/models/m"), "0"), sequences=7, timeout_s=10.0)


async def served(vllm: Vllm, requests: int) -> list[Record]:
    """Asks it for three tokens each time, and checks that its processes ran and have ended."""
    records = [Record(0.0, 2) for _ in range(requests)]
    with vllm.served() as connect:
        async with connect() as ask:
            for record in records:
                await ask([5, 6], 3, record)
        processes = [pid for one in told(vllm.python, stub_vllm.STARTED) for pid in one["pids"]]
        assert all(cores.command(pid) for pid in processes)
        own = [sorted(os.sched_getaffinity(pid)) for pid in processes[1::2]]
        assert own == [sorted(of) for of in vllm._cores()]
    await until(lambda: not any(cores.command(pid) for pid in processes), "all processes have ended")
    return records


async def test_one_instance(python: Path) -> None:
    vllm = a_vllm("whole", python)
    assert (vllm.name, vllm.devices, vllm.instances) == ("vLLM whole 128", len(os.sched_getaffinity(0)), 1)
    (record,) = await served(vllm, 1)
    assert ([count for _, count in record.arrivals], record.error) == ([1, 1, 1], "")
    (started,) = told(python, stub_vllm.STARTED)
    assert started["environment"]["OMP_NUM_THREADS"] == str(vllm.devices)
    assert started["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert started["options"][started["options"].index("--max-num-batched-tokens") + 1] == "128"
    assert started["options"][started["options"].index("--max-num-seqs") + 1] == "7"
    assert "--kv-transfer-config" not in started["options"]
    (asked,) = told(python, stub_vllm.ASKED)
    assert (asked["prompt"], asked["max_tokens"], asked["model"]) == ([5, 6], 3, "/models/m")
    assert all(asked[name] for name in ("stream", "ignore_eos", "return_token_ids"))


async def test_instances_take_turns(python: Path) -> None:
    vllm = a_vllm("replicas:64", python)
    count = len(os.sched_getaffinity(0))
    assert vllm.instances == count
    records = await served(vllm, 2 * count)
    assert [record.error for record in records] == [""] * (2 * count)
    ports = [asked["port"] for asked in told(python, stub_vllm.ASKED)]
    assert len(set(ports)) == count
    assert ports[:count] == ports[count:]
    assert all(one["environment"]["OMP_NUM_THREADS"] == "1" for one in told(python, stub_vllm.STARTED))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
async def test_prefill_and_decode_apart(python: Path) -> None:
    (record,) = await served(a_vllm("apart", python), 1)
    assert ([count for _, count in record.arrivals], record.error) == ([1, 1, 1], "")
    first, second = told(python, stub_vllm.STARTED)
    side_ports = {one["environment"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] for one in (first, second)}
    assert len(side_ports) == 2
    assert all("NixlConnector" in " ".join(one["options"]) for one in (first, second))
    prefill, decode = told(python, stub_vllm.ASKED)
    assert (prefill["max_tokens"], prefill["kv_transfer_params"]["do_remote_decode"]) == (1, True)
    assert (decode["max_tokens"], decode["prompt"]) == (3, prefill["prompt"])
    assert decode["kv_transfer_params"] == {"do_remote_prefill": True, "remote_port": prefill["port"]}
    assert decode["port"] != prefill["port"]


async def test_no_engine_outlives_its_server(python: Path) -> None:
    with a_vllm("whole", python).served():
        ((server, engine),) = [one["pids"] for one in told(python, stub_vllm.STARTED)]
        os.kill(server, signal.SIGKILL)
        await until(lambda: not cores.command(server), "the server has crashed")
        assert cores.command(engine)
    await until(lambda: not cores.command(engine), "its engine has ended")


def test_what_is_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    python, openmp = tmp_path / "bin" / "python", tmp_path / "lib" / "libiomp5.so"
    monkeypatch.setattr("ctypes.util.find_library", lambda _: None)
    assert preloaded(python) == {"tcmalloc": None, "libiomp5": None}
    assert environment(python, 1, 1)["LD_PRELOAD"] == ""
    assert [line.split()[:5] for line in capsys.readouterr().err.splitlines()] == [
        ["WARNING:", "vLLM", "runs", "without", name] for name in ("tcmalloc,", "libiomp5,")
    ]
    openmp.parent.mkdir()
    openmp.touch()
    monkeypatch.setattr("ctypes.util.find_library", {"tcmalloc": "libtcmalloc.so.4"}.get)
    assert preloaded(python) == {"tcmalloc": "libtcmalloc.so.4", "libiomp5": str(openmp)}
    assert environment(python, 1, 1)["LD_PRELOAD"] == f"libtcmalloc.so.4:{openmp}"
    assert capsys.readouterr().err == ""


def test_what_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'both' is none of whole, replicas, apart"):
        a_vllm("both", tmp_path)
    not_there = pytest.raises(InvalidRequestError, match="cannot run")
    with not_there, a_vllm("whole", tmp_path / "python").served():
        pass
    no_vllm = pytest.raises(InvalidRequestError, match=r"(?s)status 1:.*No module named 'vllm'")
    with no_vllm, a_vllm("whole", Path(sys.executable)).served():
        pass


def test_threads_that_poll_yield() -> None:
    busy = "threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()"
    script = f"import threading, time\n{busy}\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            (polling,) = cores.yield_when_polling(process.pid, watch_s=0.5)
            assert polling != process.pid
            assert os.getpriority(os.PRIO_PROCESS, polling) == 10
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == 0
        finally:
            process.kill()
