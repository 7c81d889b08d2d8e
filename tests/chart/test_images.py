"""Each image has what its service needs and nothing of its siblings', and the service starts from it."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chart import render
from images import DOCKERFILES, Dockerfile, build
from inprocess import SECRET
from polling import until

SERVICES = ("router", "prefill", "decode", "kvstore")
PORTIONS = {
    "cli": {"v1", "kernels", "common", "client", "cli"},
    "router": {"v1", "kernels", "common", "router"},
    "kvstore": {"v1", "kernels", "common", "kvstore"},
    "prefill": {"v1", "kernels", "common", "engine", "prefill"},
    "decode": {"v1", "kernels", "common", "engine", "decode"},
}
every_image = pytest.mark.parametrize("name", PORTIONS)


def test_every_image_of_the_chart_has_a_dockerfile() -> None:
    images = {pod["containers"][0]["image"] for name, pod in render().pods() if not name.endswith("redis")}
    assert images == {f"zipserve-{name}:0.1.0" for name in DOCKERFILES}
    assert set(DOCKERFILES) == set(PORTIONS)


@every_image
def test_images_are_built_in_stages_from_a_pinned_base(name: str) -> None:
    dockerfile = Dockerfile.read(DOCKERFILES[name])
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+-slim-\w+", dockerfile.all("ARG", 0)[0])
    assert dockerfile.all("FROM", 1) == ["${PYTHON} AS build"]
    assert dockerfile.all("FROM", 2) == ["${PYTHON}"]
    assert dockerfile.all("USER", 2) == ["10001"]
    assert dockerfile.all("COPY", 2) == ["--from=build /opt/zipserve /opt/zipserve"]
    assert all("--constraint constraints.txt" in run for run in dockerfile.all("RUN", 1) if "'.[" in run)
    # the chart mounts a volume there, and everything else is read-only
    assert "HOME=/cache" in dockerfile.all("ENV", 2)[0]
    assert dockerfile.entrypoint == ["python", "-m", f"zipserve.{name}"]


@pytest.mark.slow
@every_image
async def test_the_service_starts_from_its_image(
    name: str, tmp_path: Path, tiny_model: Path, redis_url: str, cluster: str
) -> None:
    python = build(name, tmp_path)
    listed = "import zipserve; print(*sorted({p.name for root in zipserve.__path__ for p in __import__('pathlib').Path(root).iterdir()}))"
    portions = subprocess.run([python, "-I", "-c", listed], check=True, capture_output=True, text=True).stdout.split()
    assert set(portions) - {"__pycache__"} == PORTIONS[name]
    _, *arguments = Dockerfile.read(DOCKERFILES[name]).entrypoint
    if name == "cli":
        command = [python, *arguments, "generate", "hi", "--address", "127.0.0.1:9", "--timeout", "1"]
        told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(tmp_path))
        assert (told.returncode, told.stderr.split(":")[:2]) == (1, ["zipserve", " WORKER_LOST"])
        return
    options = [f"--redis-url={redis_url}", f"--cluster={cluster}", "--listen=127.0.0.1:0", "--metrics-port=0"]
    options += [f"--secret={SECRET}", *([] if name == "kvstore" else [f"--model={tiny_model}"])]
    log = tmp_path / "log"
    with _started([str(python), *arguments, *options], log, tmp_path) as process:
        await until(lambda: "service.ready" in log.read_text() or process.poll() is not None, "it is ready", 60.0)
        assert "service.ready" in log.read_text(), log.read_text()
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.poll() is not None, "it has ended", 20.0)
        assert process.returncode == 0


def _environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in {"PATH", "LD_LIBRARY_PATH"}}
    return {**kept, "HOME": str(home), "PYTHONSAFEPATH": "1", "XDG_CACHE_HOME": str(Path.home() / ".cache")}


@contextmanager
def _started(command: list[str], log: Path, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stderr=sink, cwd=home, env=_environment(home))
    try:
        yield process
    finally:
        process.kill()
        process.wait()
