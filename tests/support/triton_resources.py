"""Compiles the Triton kernels for devices that are not here, and says what each takes of them.

    python tests/support/triton_resources.py sm_90

writes one JSON line a kernel and case. Triton is given a driver that names the target, and launches become
compilations: each op's own function runs, so that a kernel is compiled with exactly the arguments, constants and
alignments that it gets. All this needs a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from zipserve.kernels.attention import OpenBlocks, RawFormat, SealedBlocks
from zipserve.kernels.attention.triton_kernel import decode_attention_triton
from zipserve.kernels.checksum.triton_kernel import checksum_triton
from zipserve.kernels.dequantize.triton_kernel import dequantize_triton
from zipserve.kernels.quantize.triton_kernel import quantize_triton
from zipserve.kernels.saliency.triton_kernel import probe_scores_triton
from zipserve.kernels.zipformat import ZipFormat

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES_MAX = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that one program may have."""

KV_HEADS, GROUP, BLOCK, ROWS = 8, 4, 128, 16
"""Llama-3-8B's; its head_dim is 128, that of small models 64."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    target: str
    registers: int
    """Of a thread."""
    shared_bytes: int
    """Of a program."""
    spills: int
    """Bytes of a thread (CUDA) or registers (HIP) that lie in memory instead."""


@contextmanager
def compiled_for(target: str) -> Iterator[list[Resources]]:
    """Within, a kernel's launch only compiles it for `target` and adds to the list; its outputs stay unwritten."""
    found: list[Resources] = []

    def launcher(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def compile_only(*arguments: Any, **options: Any) -> None:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            found.append(_resources(kernel.__name__, target, compiled))

        return compile_only

    before = JITFunction.__getitem__
    JITFunction.__getitem__ = launcher
    triton.runtime.driver.set_active(_Absent(target))
    try:
        yield found
    finally:
        JITFunction.__getitem__ = before


class _Absent:
    """The driver of a device that is not here."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> str:
        """The key of Triton's caches."""
        return self._target

    def get_current_stream(self, device: str) -> int:
        """Never used."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return TARGETS[self._target]


def _resources(name: str, target: str, compiled: Any) -> Resources:
    if TARGETS[target].backend == "hip":
        found = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", compiled.asm["amdgcn"])}
        spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        return Resources(name, target, found["vgpr_count"], compiled.metadata.shared, spills)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return Resources(name, target, found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


def octets(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def attention(dim: int, profile: str, dtype: torch.dtype) -> None:
    form: ZipFormat | RawFormat = RawFormat(KV_HEADS, dim, dim, BLOCK, dtype)
    if profile != "raw":
        form = ZipFormat(KV_HEADS, dim, dim, BLOCK, profile)
    per_row = torch.zeros(ROWS, dtype=torch.int32)
    table = torch.zeros(ROWS, 32, dtype=torch.int32)
    sealed = SealedBlocks(form, octets(1, form.layer_bytes), table, per_row, per_row, octets(1, 32), per_row)
    rows = torch.zeros(1, KV_HEADS, BLOCK, dim, dtype=dtype)
    query = torch.zeros(ROWS, KV_HEADS * GROUP, dim, dtype=dtype)
    decode_attention_triton(
        query, sealed, OpenBlocks(rows, rows, per_row, per_row), per_row, scale=dim**-0.5, softcap=None,
        sink_logits=None, with_weights=True,
    )  # fmt: skip


def quantize(dim: int, profile: str, dtype: torch.dtype) -> None:
    form = ZipFormat(KV_HEADS, dim, dim, BLOCK, profile)
    rows = torch.zeros(1, KV_HEADS, BLOCK, dim, dtype=dtype)
    hi, slabs = torch.zeros(1, BLOCK, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    quantize_triton(rows, rows, hi, form, octets(1, form.layer_bytes), slabs, octets(1, 32), slabs)


def dequantize(dim: int, profile: str, _: torch.dtype) -> None:
    form = ZipFormat(KV_HEADS, dim, dim, BLOCK, profile)
    slabs = torch.zeros(1, dtype=torch.int64)
    dequantize_triton(octets(1, form.layer_bytes), slabs, form, octets(1, 32), slabs)


def saliency(dim: int, _: str, dtype: torch.dtype) -> None:
    rows = torch.zeros(14, dtype=torch.int64)
    query, keys = torch.zeros(KV_HEADS * GROUP, 14, dim, dtype=dtype), torch.zeros(KV_HEADS, BLOCK, dim, dtype=dtype)
    probe_scores_triton(query, keys, rows, rows, rows, rows[:1], BLOCK, dim**-0.5, None, None)


def checksum(_: int, __: str, ___: torch.dtype) -> None:
    checksum_triton(octets(1 << 20))


CASES = [
    *((op, dim, "4/32", torch.bfloat16) for op in (attention, quantize, dequantize, saliency) for dim in (64, 128)),
    *((op, 128, "43/32", torch.float16) for op in (attention, quantize)),
    *((op, 128, "4/32", torch.float32) for op in (attention, quantize, saliency)),
    (attention, 128, "raw", torch.bfloat16),
    (checksum, 0, "", torch.uint8),
]


def main(target: str) -> None:
    """Writes what each kernel takes."""
    for op, dim, profile, dtype in CASES:
        with compiled_for(target) as kernels:
            op(dim, profile, dtype)
        case = f"{dim} {profile} {str(dtype).removeprefix('torch.')}" if dim else ""
        for kernel in kernels:
            line = {"op": op.__name__, "case": case, **asdict(kernel)}
            sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
