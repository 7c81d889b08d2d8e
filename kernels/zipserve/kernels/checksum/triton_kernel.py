"""The checksum's two sums in Triton: every program sums a stretch of words, the host adds up and finishes."""

import torch
import triton
import triton.language as tl

from zipserve.kernels.checksum.reference import finish

_TILE = 1024
_PROGRAMS = 512
"""About as many as fill the largest devices."""


def checksum_triton(data: torch.Tensor, seed: int = 0) -> int:
    """Checksum of bytes in device memory, as an unsigned 64-bit number. Waits for the device.

    Args:
        data: uint8 [n], contiguous.
        seed: what the sum starts from.

    Raises:
        ValueError: the bytes are not contiguous.
    """
    if not data.is_contiguous():
        raise ValueError("the bytes are not contiguous")
    if data.data_ptr() % 4:  # the kernel reads words
        data = data.clone()
    size = data.numel()
    programs = max(1, min(_PROGRAMS, triton.cdiv(size, 4 * _TILE)))
    sums = torch.empty(2, programs, dtype=torch.int64, device=data.device)
    _checksum_kernel[(programs,)](data, size, sums, TILE=_TILE)
    plain, weighted = sums.sum(1).tolist()
    return finish(plain, weighted, size, seed)


@triton.jit
def _checksum_kernel(data, size, sums, TILE: tl.constexpr):
    """Sums of words and of words times index, modulo 2^64, to sums int64 [2, programs]."""
    lanes = tl.arange(0, TILE)
    words = data.to(tl.pointer_type(tl.uint32))
    count = size // 4
    plain, weighted = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for begin in range(program * TILE, count, programs * TILE):
        index = begin + lanes
        word = tl.load(words + index, mask=index < count, other=0).to(tl.int64)  # [TILE]
        plain += word
        weighted += word * index
    if program == 0:  # the bytes behind the last whole word
        rest = 4 * count + lanes
        word = tl.load(data + rest, mask=rest < size, other=0).to(tl.int64) << (8 * (lanes % 4))  # [TILE]
        plain += word
        weighted += word * count
    tl.store(sums + program, tl.sum(plain))
    tl.store(sums + programs + program, tl.sum(weighted))
