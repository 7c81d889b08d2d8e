"""Each image has what its service needs and nothing of its siblings', and the service starts from it."""

import asyncio
import functools
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
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


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Interpreters of the images' environments."""
    return functools.cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.mark.slow
@every_image
def test_an_image_holds_no_sibling(name: str, pythons: Callable[[str], Path]) -> None:
    lists = "import os, zipserve; print(*{name for root in zipserve.__path__ for name in os.listdir(root)})"
    command = [str(pythons(name)), "-I", "-c", lists]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert set(told) - {"__pycache__"} == PORTIONS[name]


@pytest.mark.slow
def test_the_command_line_asks_from_its_image(pythons: Callable[[str], Path], tmp_path: Path) -> None:
    command = [str(pythons("cli")), *started("cli"), "generate", "hi", "--address", "127.0.0.1:9", "--timeout", "1"]
    environment = _environment(tmp_path)
    told = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (told.returncode, told.stderr.split(":")[:2]) == (1, ["zipserve", " WORKER_LOST"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVICES)
async def test_the_service_starts_from_its_image(
    name: str, pythons: Callable[[str], Path], tmp_path: Path, tiny_model: Path, redis_url: str, cluster: str
) -> None:
    options = [f"--redis-url={redis_url}", f"--cluster={cluster}", "--listen=127.0.0.1:0", "--metrics-port=0"]
    options += [f"--secret={SECRET}", *([] if name == "kvstore" else [f"--model={tiny_model}"])]
    log = tmp_path / "log"
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            pythons(name), *started(name), *options, stderr=sink, cwd=tmp_path, env=_environment(tmp_path)
        )
    try:
        settled = lambda: "service.ready" in log.read_text() or process.returncode is not None  # noqa: E731
        await until(settled, "it is ready", 60.0)
        assert "service.ready" in log.read_text(), log.read_text()
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20.0) == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()


def started(name: str) -> list[str]:
    """What the image starts, behind its interpreter."""
    return Dockerfile.read(DOCKERFILES[name]).entrypoint[1:]


def _environment(home: Path) -> dict[str, str]:
    # kernels that this machine has compiled before are taken from its cache
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_CACHE_HOME": str(Path.home() / ".cache"),
        "PYTHONSAFEPATH": "1",
    }
