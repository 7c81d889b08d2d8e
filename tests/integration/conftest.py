"""The default model, for the tests that need a real one."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from zipserve.common import models


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the default model."""
    return models.resolve(models.DEFAULT_MODEL).folder


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    """Tokenizer of the default model."""
    return AutoTokenizer.from_pretrained(smollm2)
