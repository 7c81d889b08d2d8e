"""These tests run where a CUDA device is, or in Triton's interpreter, as tests/kernels/test_triton.py starts them."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device(interpreted: bool) -> torch.device:
    """Where kernels run."""
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    return torch.device("cpu" if interpreted else "cuda")
