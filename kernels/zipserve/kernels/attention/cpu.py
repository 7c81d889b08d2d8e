"""Calls the C kernel of decode attention: one call a layer, so that what stands here is kept short."""

import ctypes
from typing import TYPE_CHECKING

import torch

from zipserve.kernels import native
from zipserve.kernels.abi import TYPES, check, format_of
from zipserve.kernels.zipformat import ZipFormat

if TYPE_CHECKING:
    from zipserve.kernels.attention import OpenBlocks, SealedBlocks

_NO_MEMORY = -2


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("form", "query", "fresh_keys", "fresh_values")),
        *((name, ctypes.c_void_p) for name in ("sealed", "table", "counts", "starts")),
        *((name, ctypes.c_void_p) for name in ("sinks", "sink_slabs", "open_keys", "open_values", "slots")),
        *((name, ctypes.c_void_p) for name in ("open_counts", "first", "sink_logits", "output", "weights")),
        *((name, ctypes.c_int64) for name in ("sealed_stride", "sinks_stride", "table_stride")),
        *((name, ctypes.c_int64 * 2) for name in ("open_key_strides", "open_value_strides")),
        *((name, ctypes.c_int64 * 2) for name in ("query_strides", "fresh_key_strides", "fresh_value_strides")),
        *((name, ctypes.c_int64) for name in ("slabs", "sinks_slabs", "columns", "open_slots")),
        *((name, ctypes.c_int32) for name in ("rows", "heads", "open_type", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def runs_on_cpu(query: torch.Tensor, sealed: "SealedBlocks", open_blocks: "OpenBlocks") -> bool:
    """Whether `decode_attention_cpu` can do this: the tensors are on the CPU, of TYPES, and the kernel is there."""
    form, keys = sealed.form, open_blocks.keys
    return (
        query.device.type == "cpu"
        and keys.dtype in TYPES
        and keys.dtype == open_blocks.values.dtype
        and (isinstance(form, ZipFormat) or form.dtype in TYPES)
        and native.load() is not None
    )


def decode_attention_cpu(
    query: torch.Tensor,
    sealed: "SealedBlocks",
    open_blocks: "OpenBlocks",
    first: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    with_weights: bool,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See zipserve.kernels.attention.decode_attention; only where `runs_on_cpu`."""
    library = native.load()
    assert library is not None
    _check(query, sealed, open_blocks, first, sink_logits)
    form, keys, values = sealed.form, open_blocks.keys, open_blocks.values
    rows, heads, _ = query.shape
    query = _rows(query)
    fresh_key, fresh_value = (None, None) if fresh is None else map(_rows, fresh)
    sink_logits = None if sink_logits is None else sink_logits.float().contiguous()
    output = torch.empty(rows, heads, form.value_dim)
    weights = torch.empty(rows, form.block_tokens) if with_weights else None
    table, counts, starts = _int32(sealed.table), _int32(sealed.counts), _int32(sealed.starts)
    sink_slabs, first = _int32(sealed.sink_slabs), _int32(first)
    slots, open_counts = _int32(open_blocks.slots), _int32(open_blocks.counts)
    key_strides, value_strides, size = keys.stride(), values.stride(), keys.element_size()
    arguments = _Attention(
        ctypes.addressof(format_of(form)),
        query.data_ptr(),
        None if fresh_key is None else fresh_key.data_ptr(),
        None if fresh_value is None else fresh_value.data_ptr(),
        sealed.data.data_ptr(),
        table.data_ptr(),
        counts.data_ptr(),
        starts.data_ptr(),
        sealed.sinks.data_ptr(),
        sink_slabs.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        open_counts.data_ptr(),
        first.data_ptr(),
        None if sink_logits is None else sink_logits.data_ptr(),
        output.data_ptr(),
        None if weights is None else weights.data_ptr(),
        sealed.data.stride(0),
        sealed.sinks.stride(0),
        table.stride(0),
        (key_strides[0] * size, key_strides[1] * size),
        (value_strides[0] * size, value_strides[1] * size),
        query.stride()[:2],
        (0, 0) if fresh_key is None else fresh_key.stride()[:2],
        (0, 0) if fresh_value is None else fresh_value.stride()[:2],
        *(sealed.data.shape[0], sealed.sinks.shape[0], table.shape[1], keys.shape[0]),
        *(rows, heads, TYPES[keys.dtype], torch.get_num_threads()),
        *(scale, softcap or 0.0),
    )
    wrong = library.zs_attention(ctypes.byref(arguments))
    if wrong == _NO_MEMORY:
        raise MemoryError(f"attention of {rows} rows")
    if wrong >= 0:
        raise IndexError(f"row {wrong} refers to a slab or slot that does not exist, or sees no key")
    return output, weights


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As float32 with contiguous rows: itself, in nearly all cases."""
    x = x.float()
    return x if x.stride(2) == 1 else x.contiguous()


def _check(
    query: torch.Tensor,
    sealed: "SealedBlocks",
    open_blocks: "OpenBlocks",
    first: torch.Tensor,
    sink_logits: torch.Tensor | None,
) -> None:
    """What the kernel takes for granted: otherwise it would read elsewhere."""
    form, keys, values = sealed.form, open_blocks.keys, open_blocks.values
    rows, heads, key_dim = query.shape
    if key_dim != form.key_dim or heads % form.kv_heads:
        raise ValueError(f"query {[*query.shape]} does not fit {form}")
    shape = keys.shape[0], form.kv_heads, form.block_tokens
    for part, dim in ((keys, form.key_dim), (values, form.value_dim)):
        if part.shape != (*shape, dim) or part.stride()[2:] != (dim, 1):
            raise ValueError(f"open block {[*part.shape]} with strides {part.stride()} does not fit {form}")
    of_rows = first, sealed.counts, sealed.starts, sealed.sink_slabs, open_blocks.slots, open_blocks.counts
    if any(index.shape != (rows,) for index in of_rows) or sealed.table.shape[0] != rows:
        raise ValueError(f"every index of rows must be [{rows}]")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise ValueError(f"sink_logits must be [{heads}], not {[*sink_logits.shape]}")
    check("blocks", sealed.data, (sealed.data.shape[0], form.layer_bytes), torch.uint8)
    if isinstance(form, ZipFormat):
        check("sinks", sealed.sinks, (sealed.sinks.shape[0], form.sinks_layer_bytes), torch.uint8)


def _int32(index: torch.Tensor) -> torch.Tensor:
    """Itself, in nearly all cases."""
    return index if index.dtype is torch.int32 and index.is_contiguous() else index.int().contiguous()
