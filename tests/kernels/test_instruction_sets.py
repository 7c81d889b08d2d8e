"""The CPU kernels for other CPUs than this one: their vectors are narrower, and other code is taken for them."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = ("attention", "decoder", "dequantize", "linear", "prefill_attention", "quantize", "saliency")
PROGRAM = """
import sys

import pytest

from zipserve.kernels import native

native.FLAGS = tuple(sys.argv[1] if flag == "-march=native" else flag for flag in native.FLAGS)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86")
@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(architecture: str) -> None:
    """128 bits without fused products, and 256 bits with them."""
    files = [str(Path(__file__).parent / f"test_{name}.py") for name in KERNELS]
    command = [sys.executable, "-c", PROGRAM, f"-march={architecture}", *files]
    tests = subprocess.run(command, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout + tests.stderr
