"""Checksum of KV bytes: a 64-bit position-weighted sum of 32-bit words.

With w_i the little-endian words of the data (the last one padded with zeros), all arithmetic modulo 2^64:

    checksum = mix(seed + A * sum(w_i) + B * sum(i * w_i) + length),    A odd, B = 2 * odd

Any change within one word is detected with certainty (its weight A + B * i is odd), and so is any swap of two words
(2^64 does not divide B * (i - j) * (w_i - w_j) for data below 2^30 words). Of random damage 2^-64 escapes. It is no
MAC: changes of three and more words whose sum and first moment are both zero cancel, such as +1, -2, +1 in a row. Both
sums split over threads and devices. `mix` is a bijection that spreads the result over all bits.
"""

import ctypes
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from zipserve.kernels import native
from zipserve.kernels.checksum.reference import checksum_reference, finish

Buffer: TypeAlias = memoryview | bytes | bytearray | npt.NDArray[np.uint8]

__all__ = ["Buffer", "checksum", "checksum_reference"]


def checksum(data: Buffer, seed: int = 0) -> int:
    """Checksum of contiguous bytes in host memory, as an unsigned 64-bit number.

    The GIL is released while the bytes are read. Falls back to the reference where no C compiler exists.

    Raises:
        ValueError: the bytes are not contiguous.
    """
    try:
        view = np.frombuffer(data, dtype=np.uint8)
    except BufferError as error:  # a memoryview says so by another class than an array does
        raise ValueError("the bytes are not contiguous") from error
    library = native.load()
    if library is None:
        return checksum_reference(view, seed)
    sums = (ctypes.c_uint64 * 2)()
    library.zs_checksum(ctypes.c_void_p(view.ctypes.data), ctypes.c_uint64(view.size), sums)
    return finish(sums[0], sums[1], view.size, seed)
