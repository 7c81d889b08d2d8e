"""The Triton kernels where no GPU is: their numbers in Triton's interpreter, and what a compiled one takes of a device.

Both happen in processes of their own: the interpreter must be chosen before Triton is imported, and the compiler is
given a driver of a device that is not there.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import triton_resources


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_numbers_in_the_interpreter() -> None:
    """The tests that run on a GPU where one is."""
    cases = Path(__file__).parent / "triton_cases"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={cases}", str(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    tests = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "skipped" not in tests.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", triton_resources.SHARED_BYTES_MAX)
def test_compiled_kernels_fit_the_device(target: str, tmp_path: Path) -> None:
    """None spills registers or takes more shared memory than there is; prints what each takes."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, triton_resources.__file__, target]
    compiled = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    kernels = [json.loads(line) for line in compiled.stdout.splitlines()]
    for kernel in kernels:
        sys.stdout.write("{op:10} {kernel:18} {case:20} {target:6}".format(**kernel))
        sys.stdout.write("{registers:4} registers {shared_bytes:6} B shared {spills:3} spills\n".format(**kernel))
    assert len({kernel["kernel"] for kernel in kernels}) == 9
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared_bytes"] <= triton_resources.SHARED_BYTES_MAX[target], kernel


@pytest.mark.parametrize(
    "name",
    [
        "quantize.quantize",
        "dequantize.dequantize",
        "attention.decode_attention",
        "saliency.probe_scores",
        "saliency.log_sum_exp",
    ],
)
def test_cuda_tensors_go_to_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every argument at its place. What is `fresh` is written before, by torch."""
    package, function = name.split(".")
    public = getattr(importlib.import_module(f"zipserve.kernels.{package}"), function)
    module = importlib.import_module(f"zipserve.kernels.{package}.triton_kernel")
    kernel, called = getattr(module, f"{function}_triton"), Mock()
    monkeypatch.setattr(module, f"{function}_triton", called)
    arguments = {parameter: Mock(is_cuda=True) for parameter in inspect.signature(public).parameters}
    arguments.pop("fresh", None)
    assert public(**arguments) is called.return_value
    given = inspect.signature(kernel).bind(*called.call_args.args, **called.call_args.kwargs)
    assert given.arguments == arguments
