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
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

import triton_resources


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them at once, for each has use for one core only: the interpreter, and a compiler for each target."""
    cases = Path(__file__).parent / "triton_cases"
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={cases}", str(cases)]
    started = {"interpreter": _start(tests, TRITON_INTERPRET="1")}
    for target in triton_resources.SHARED_BYTES_MAX:
        cache = str(tmp_path_factory.mktemp(target))
        command = [sys.executable, triton_resources.__file__, target]
        started[target] = _start(command, TRITON_CACHE_DIR=cache, TRITON_DEFAULT_FP_FUSION="1")
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def _start(command: list[str], **changes: str) -> subprocess.Popen[str]:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"} | changes
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_numbers_in_the_interpreter(processes: dict[str, subprocess.Popen[str]]) -> None:
    """The tests that run on a GPU where one is."""
    out, err = processes["interpreter"].communicate()
    assert processes["interpreter"].returncode == 0, out + err
    assert "skipped" not in out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", triton_resources.SHARED_BYTES_MAX)
def test_compiled_kernels_fit_the_device(target: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    """None spills registers or takes more shared memory than there is; prints what each takes."""
    out, err = processes[target].communicate()
    assert processes[target].returncode == 0, err
    kernels = [json.loads(line) for line in out.splitlines()]
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
