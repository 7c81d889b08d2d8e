"""What several contract tests start from."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import router_model
from workers import Workers, workers
from zipserve.common.models import ModelFiles, resolve


@pytest.fixture
async def cluster_workers(tiny_model: Path, redis_url: str, cluster: str) -> AsyncIterator[Workers]:
    """Starts prefill and decode workers of a cluster of its own."""
    async with workers(tiny_model, redis_url, cluster) as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The model that a router tokenizes for; its fake workers need no weights."""
    return resolve(str(router_model.write(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Ends what a test has started."""
    async with AsyncExitStack() as stack:
        yield stack
