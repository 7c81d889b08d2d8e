"""Replays a Dockerfile without Docker: what it copies, what it installs, and what it starts.

The packages that pip would bring are linked from this environment: the ones that the extra names, and all that those
need, so that a dependency that nobody declared is missing as it would be in the image.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
DOCKERFILES = {path.parent.name: path for path in sorted(REPOSITORY.glob("services/*/Dockerfile"))}


@dataclass(frozen=True)
class Dockerfile:
    """What it says, as far as it can be replayed."""

    stages: list[list[tuple[str, str]]]
    """Instructions and arguments."""

    @classmethod
    def read(cls, path: Path) -> "Dockerfile":
        text = re.sub(r"\\\n", " ", path.read_text())
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        stages: list[list[tuple[str, str]]] = [[]]
        for line in lines:
            instruction, _, arguments = line.partition(" ")
            if instruction == "FROM":
                stages.append([])
            stages[-1].append((instruction, arguments.strip()))
        return cls(stages)

    def all(self, instruction: str, stage: int) -> list[str]:
        """Arguments of an instruction in a stage; 0 stands before the first one."""
        return [arguments for name, arguments in self.stages[stage] if name == instruction]

    @property
    def extra(self) -> str:
        """Of this distribution, what is installed."""
        (found,) = [match for run in self.all("RUN", 1) for match in re.findall(r"pip install .*'\.\[(\w+)\]'", run)]
        return str(found)

    @property
    def entrypoint(self) -> list[str]:
        (command,) = self.all("ENTRYPOINT", 2)
        return list(json.loads(command))


def build(name: str, folder: Path) -> Path:
    """Makes the virtual environment that an image has; returns its interpreter."""
    dockerfile = Dockerfile.read(DOCKERFILES[name])
    source, environment = folder / "src", folder / "venv"
    for arguments in dockerfile.all("COPY", 1):
        *paths, target = arguments.split()
        for path in paths:
            _copy(REPOSITORY / path, source / target, keep_name=target.endswith("/"))
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    # the hook of the sources as they were copied, not of this environment
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([*wheel, str(source)], check=True, env=clean)
    venv.create(environment, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    (built,) = folder.glob("zipserve-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    for distribution in sorted(needed(dockerfile.extra)):
        _link(distribution, site)
    return environment / "bin/python"


def needed(extra: str) -> set[str]:
    """Names of all distributions that `zipserve[extra]` brings, as their metadata have it."""
    found: set[tuple[str, str]] = set()
    waiting = [("zipserve", extra), ("zipserve", "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                child = canonicalize_name(requirement.name)
                waiting += [(child, each) for each in ("", *requirement.extras)]
    return {name for name, _ in found} - {"zipserve"}


def _copy(source: Path, target: Path, *, keep_name: bool) -> None:
    ignored = [line.removeprefix("**/") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line]
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*ignored), dirs_exist_ok=True)
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / source.name if keep_name else target)


def _link(distribution: str, site: Path) -> None:
    files = metadata.distribution(distribution).files or []
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        target = Path(str(metadata.distribution(distribution).locate_file(top)))
        if target.exists() and not (site / top).exists():
            (site / top).symlink_to(target)
