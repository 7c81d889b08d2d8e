"""The structures of zipformat.h, and how formats and tensors become them."""

import ctypes
import functools
from typing import TYPE_CHECKING

import torch

from zipserve.kernels import rotation
from zipserve.kernels.zipformat import VALUE_STEPS, Region, ZipFormat

if TYPE_CHECKING:
    from zipserve.kernels.attention import RawFormat

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The numbers that attention reads, with the kernels' names for them: `enum content`."""
_ZIPPED = 3


class Plane(ctypes.Structure):
    """struct zip_plane"""

    _fields_ = (("offset", ctypes.c_int64), ("bits", ctypes.c_int32), ("shift", ctypes.c_int32))


class CodeRegion(ctypes.Structure):
    """struct zip_region"""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("step", ctypes.c_float),
        ("plane", Plane * 2),
    )


class Format(ctypes.Structure):
    """struct zip_format"""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bitmap_bytes", "head_bytes", "exponent_offset")),
        *((name, ctypes.c_int32) for name in ("kv_heads", "block_tokens", "key_dim", "value_dim", "content")),
        ("key_factors", ctypes.POINTER(ctypes.c_float)),
        ("value_factors", ctypes.POINTER(ctypes.c_float)),
        ("keys", CodeRegion * 2),
        ("values", CodeRegion * 2),
    )


class Slabs(ctypes.Structure):
    """struct zip_slabs"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("index", ctypes.c_void_p),
    )


class Rows(ctypes.Structure):
    """struct zip_rows"""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("block", "head", "token")))


@functools.cache
def format_of(form: "ZipFormat | RawFormat") -> Format:
    """The format's sizes and offsets; it lives as long as the process."""
    shape = form.kv_heads, form.block_tokens, form.key_dim, form.value_dim
    if not isinstance(form, ZipFormat):
        return Format(0, form.layer_bytes // form.kv_heads, 0, *shape, TYPES[form.dtype])
    return Format(
        *(form.bitmap_bytes, form.head_bytes, form.exponent_offset),
        *(*shape, _ZIPPED),
        *(_factors(form.key_dim), _factors(form.value_dim)),
        (CodeRegion * 2)(*map(_region, form.keys)),
        (CodeRegion * 2)(*map(_region, form.values)),
    )


def rows_of(x: torch.Tensor) -> Rows:
    """float32 [n, heads, tokens, dim], the last one contiguous; it must outlive the result."""
    return Rows(x.data_ptr(), *x.stride()[:3])


def slabs_of(layer: torch.Tensor, index: torch.Tensor, layer_bytes: int, blocks: int) -> Slabs:
    """uint8 [slabs, layer_bytes] and a contiguous int64 [blocks]; both must outlive the result.

    Raises:
        ValueError: another shape or dtype.
    """
    count = layer.shape[0]
    check("slabs", layer, (count, layer_bytes), torch.uint8)
    check("indices of slabs", index, (blocks,), torch.int64)
    return Slabs(layer.data_ptr(), layer.stride(0), count, index.data_ptr())


def check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """What a kernel takes for granted: otherwise it would read or write elsewhere.

    Raises:
        ValueError: `x` has another shape or dtype, or its last dimension is not contiguous.
    """
    if x.shape != shape or x.stride(-1) != 1 or dtype not in (None, x.dtype):
        needed = f"{list(shape)}" if dtype is None else f"{dtype} {list(shape)}"
        raise ValueError(f"{name} must be {needed}, not {x.dtype} {list(x.shape)} with strides {list(x.stride())}")


def check_slabs(missing: int, slabs: torch.Tensor, sink_slabs: torch.Tensor) -> None:
    """What a kernel returns: the first block whose slab, or whose sinks' slab, does not exist, or -1.

    Raises:
        IndexError: there is one.
    """
    if missing >= 0:
        raise IndexError(f"block {missing}: no slab {int(slabs[missing])} or none for sinks {int(sink_slabs[missing])}")


def _region(region: Region) -> CodeRegion:
    shift, planes = region.bits, (Plane * 2)()
    for index, (bits, offset, _) in enumerate(region.planes):
        shift -= bits
        planes[index] = Plane(offset, bits, shift)
    return CodeRegion(region.bits, region.tokens, len(region.planes), VALUE_STEPS[region.bits], planes)


def _factors(dim: int) -> ctypes.Array[ctypes.c_float]:
    scale = (dim & -dim) ** -0.5  # 1 / sqrt(p)
    return (ctypes.c_float * dim)(*(scale * sign for sign in rotation.signs(dim)))
