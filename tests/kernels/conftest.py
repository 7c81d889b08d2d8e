"""Fixtures of the kernels' tests."""

import shutil
from collections.abc import Iterator

import pytest

from zipserve.kernels import native


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a C compiler: every operation falls back to its reference."""
    native.load.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    yield
    native.load.cache_clear()
