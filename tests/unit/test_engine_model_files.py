"""Which folder a model's name leads to, and which revision its files have."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects

from zipserve.common import models
from zipserve.common.errors import InvalidRequestError, ModelNotFoundError
from zipserve.common.models import DEFAULT_MODEL, resolve

FILES = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "tokens",
    "chat_template.jinja": "template",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zipserve" / "models"


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "mine", FILES)
    files = resolve(str(folder))
    assert (files.name, files.folder) == ("mine", folder)
    monkeypatch.chdir(tmp_path)
    assert resolve("mine") == resolve("./mine") == resolve("mine/") == files


@pytest.mark.parametrize("name", [*FILES, "vocab.json", "model-00002-of-00002.safetensors", "tokenizer_config.json"])
def test_revision_depends_on_every_file_that_counts(tmp_path: Path, name: str) -> None:
    before = resolve(str(write(tmp_path / "a", FILES))).revision
    assert before == resolve(str(write(tmp_path / "b", FILES))).revision
    assert len(before) == 64
    assert before != resolve(str(write(tmp_path / "b", {name: "changed"}))).revision


def test_revision_does_not_depend_on_other_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", FILES)
    before = resolve(str(folder)).revision
    write(folder, {"README.md": "hello", "pytorch_model.bin": "other weights", ".gitattributes": ""})
    (folder / "onnx").mkdir()
    assert resolve(str(folder)).revision == before


def test_revision_tells_names_from_contents(tmp_path: Path) -> None:
    one = resolve(str(write(tmp_path / "a", FILES | {"a.safetensors": "x", "b.safetensors": "y"})))
    two = resolve(str(write(tmp_path / "b", FILES | {"a.safetensors": "y", "b.safetensors": "x"})))
    assert one.revision != two.revision


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_a_model(tmp_path: Path, missing: str) -> None:
    folder = write(tmp_path / "mine", {name: text for name, text in FILES.items() if name != missing})
    with pytest.raises(InvalidRequestError, match=f"has no .*{missing.removeprefix('model')}"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "", "what is this?"])
def test_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="is no folder here, nor a Hugging Face id"):
        resolve(name)


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(write(tmp_path / "snapshot", FILES))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    files = resolve("some-org/some.model-1B")
    assert (files.name, files.folder) == ("some-org/some.model-1B", tmp_path / "snapshot")
    assert asked["repo"] == "some-org/some.model-1B"
    allowed = filter_repo_objects(
        [*FILES, "pytorch_model.bin", "onnx/model.safetensors", "generation_config.json", "modeling_x.py"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert sorted(allowed) == sorted([*FILES, "generation_config.json"])


def test_hub_does_not_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelNotFoundError, match="and Hugging Face did not give it: no connection"):
        resolve("org/name")


def test_default_model_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        calls.append(command)
        write(cache / DEFAULT_MODEL, FILES)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    files = resolve(DEFAULT_MODEL)
    assert (files.name, files.folder) == (DEFAULT_MODEL, cache / DEFAULT_MODEL)
    assert resolve(DEFAULT_MODEL) == files
    assert calls == [[sys.executable, "-P", "-m", "zipserve.engine.default_model"]]


def test_default_model_cannot_be_converted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(ModelNotFoundError, match="default_model exited with 1"):
        resolve(DEFAULT_MODEL)


def test_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, json, zipserve.common.models; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "transformers", "huggingface_hub"} & set(json.loads(output))


def test_default_folder_follows_the_cache(cache: Path) -> None:
    assert models.default_folder() == cache / DEFAULT_MODEL
