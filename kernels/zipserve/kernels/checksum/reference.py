"""The definition of the checksum, in NumPy."""

import numpy as np
import numpy.typing as npt

A = 0x9E3779B97F4A7C15
B = 2 * 0xD1B54A32D192ED03
_MASK = (1 << 64) - 1


def checksum_reference(data: npt.NDArray[np.uint8], seed: int = 0) -> int:
    """Checksum of `data`, uint8 [n]; see the package's docstring for the formula."""
    padded = np.zeros(-(-data.size // 4) * 4, np.uint8)
    padded[: data.size] = data
    words = padded.view("<u4").astype(np.uint64)
    index = np.arange(words.size, dtype=np.uint64)
    with np.errstate(over="ignore"):
        plain = int(words.sum(dtype=np.uint64))
        weighted = int((words * index).sum(dtype=np.uint64))
    return finish(plain, weighted, data.size, seed)


def finish(plain: int, weighted: int, size: int, seed: int) -> int:
    """Joins the two sums, the number of bytes and the seed into the checksum (mix: the finalizer of MurmurHash3)."""
    x = (seed + A * plain + B * weighted + size) & _MASK
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & _MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & _MASK
    return x ^ (x >> 33)
