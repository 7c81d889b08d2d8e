"""Guards the namespace `zipserve`, which lies in several roots.

One stray `__init__.py`, or a root missing from one list, would make whole portions vanish from imports or from the
wheel without any error.
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROTOS = REPOSITORY / "protos/zipserve/v1"
NAMESPACE_FOLDERS = sorted(
    folder
    for pattern in ("protos/zipserve", "kernels/zipserve", "services/*/zipserve", "benchmarks/zipserve")
    for folder in REPOSITORY.glob(pattern)
)
ROOTS = sorted(str(folder.parent.relative_to(REPOSITORY)) for folder in NAMESPACE_FOLDERS)
PORTIONS = sorted(
    path for folder in NAMESPACE_FOLDERS for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"
)


def _requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "zipserve"]


def test_namespace_folders_have_no_init() -> None:
    folders = [*NAMESPACE_FOLDERS, *(REPOSITORY / root for root in ROOTS), REPOSITORY / "services"]
    assert [str(folder) for folder in folders if (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("portion", PORTIONS, ids=lambda portion: portion.name)
def test_portion_is_a_typed_package(portion: Path) -> None:
    assert (portion / "__init__.py").exists()
    assert (portion / "py.typed").exists()


def test_every_list_of_roots_matches_the_tree() -> None:
    tool = PYPROJECT["tool"]
    build = tool["hatch"]["build"]
    assert sorted(build["dev-mode-dirs"]) == ROOTS
    assert sorted(build["targets"]["wheel"]["packages"]) == [f"{root}/zipserve" for root in ROOTS]
    # The last one is for tests only.
    assert sorted(tool["mypy"]["mypy_path"]) == [*ROOTS, "tests/support"]
    assert sorted(tool["ruff"]["src"]) == [*ROOTS, "tests/support"]


def test_every_dependency_has_one_exact_pin() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    names = [pin.name.lower().replace("_", "-") for pin in pins]
    assert [str(pin) for pin in pins if [spec.operator for spec in pin.specifier] != ["=="]] == []
    assert sorted(names) == sorted(set(names))
    assert {requirement.name for requirement in _requirements()} - set(names) == set()


@pytest.mark.parametrize(
    ("distribution", "generated", "pattern"),
    [
        ("grpcio", "*_pb2_grpc.py", r"^GRPC_GENERATED_VERSION = '([\d.]+)'"),
        ("protobuf", "*_pb2.py", r"^# Protobuf Python Version: ([\d.]+)"),
    ],
)
def test_lower_bound_admits_generated_code(distribution: str, generated: str, pattern: str) -> None:
    """Generated code refuses at import any runtime older than its generator."""
    versions = {match for path in PROTOS.glob(generated) for match in re.findall(pattern, path.read_text(), re.M)}
    bounds = {str(item.specifier) for item in _requirements() if item.name == distribution}
    assert bounds == {f">={version}" for version in versions}


def test_wheel_contains_every_portion(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(folder.parent))
        for folder in NAMESPACE_FOLDERS
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    texts = {f"zipserve/bench/data/{path.name}" for path in (REPOSITORY / "benchmarks/data").iterdir()}
    assert packed == expected | texts
    assert {f"zipserve/v1/{proto.stem}_pb2.py" for proto in PROTOS.glob("*.proto")} <= packed
