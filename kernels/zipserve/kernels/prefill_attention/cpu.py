"""Calls the C kernel of prefill attention."""

import ctypes
from typing import TYPE_CHECKING

import torch

from zipserve.kernels import native
from zipserve.kernels.abi import TYPES, Slabs, check_slabs, format_of, slabs_of
from zipserve.kernels.zipformat import ZipFormat

if TYPE_CHECKING:
    from zipserve.kernels.prefill_attention import Prefix

_NO_MEMORY, _BAD_FIRST = -2, -3


class _Prefill(ctypes.Structure):
    _fields_ = (
        ("form", ctypes.c_void_p),
        *((name, Slabs) for name in ("blocks", "sinks")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "first", "sink_logits", "output", "lse")),
        *((name, ctypes.c_int64 * 2) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, ctypes.c_int32) for name in ("prefix_blocks", "tokens", "keys", "heads", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("key_dim", "value_dim", "start")),
        *((name, ctypes.c_int32) for name in ("query_type", "key_type", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def runs_on_cpu(query: torch.Tensor, prefix: "Prefix | None") -> bool:
    """Whether `prefill_attention_cpu` can do this: the tensors are on the CPU, of TYPES, and the kernel is there."""
    return (
        query.device.type == "cpu"
        and (prefix is None or isinstance(prefix.form, ZipFormat) or prefix.form.dtype in TYPES)
        and native.load() is not None
    )


def prefill_attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    *,
    scale: float,
    prefix: "Prefix | None",
    first: torch.Tensor | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    lse_rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See zipserve.kernels.prefill_attention.prefill_attention; only where `runs_on_cpu`."""
    library = native.load()
    assert library is not None
    query, key, value = _rows(query), _rows(key), _rows(value)
    if key.dtype != value.dtype:
        key, value = key.float(), value.float()
    first = None if first is None else first.int().contiguous()
    sink_logits = None if sink_logits is None else sink_logits.float().contiguous()
    (heads, tokens, key_dim), (kv_heads, keys, value_dim) = query.shape, value.shape
    output = torch.empty(tokens, heads, value_dim)
    lse = torch.empty(heads, tokens) if lse_rows is not None else None
    arguments = _Prefill(
        *_blocks(prefix),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        _address(first),
        _address(sink_logits),
        output.data_ptr(),
        _address(lse),
        *(x.stride()[:2] for x in (query, key, value)),
        0 if prefix is None else len(prefix.slabs),
        *(tokens, keys, heads, kv_heads, key_dim, value_dim, start),
        *(TYPES[query.dtype], TYPES[key.dtype], torch.get_num_threads()),
        *(scale, softcap or 0.0),
    )
    found = library.zs_prefill_attention(ctypes.byref(arguments))
    if found == _NO_MEMORY:
        raise MemoryError(f"attention of {tokens} tokens")
    if found == _BAD_FIRST:
        raise ValueError("first descends, or a query sees nothing")
    if prefix is not None:
        check_slabs(found, prefix.slabs, prefix.sink_slabs)
    return output, None if lse is None or lse_rows is None else lse.index_select(1, lse_rows)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Of TYPES, with contiguous rows: itself, in nearly all cases."""
    x = x if x.dtype in TYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _blocks(prefix: "Prefix | None") -> tuple[int | None, Slabs, Slabs]:
    """Format, blocks and sinks; `prefix` must have contiguous indices."""
    if prefix is None:
        return None, Slabs(), Slabs()
    form, count = prefix.form, len(prefix.slabs)
    blocks = slabs_of(prefix.data, prefix.slabs, form.layer_bytes, count)
    if not isinstance(form, ZipFormat):
        return ctypes.addressof(format_of(form)), blocks, Slabs()
    sinks = slabs_of(prefix.sinks, prefix.sink_slabs, form.sinks_layer_bytes, count)
    return ctypes.addressof(format_of(form)), blocks, sinks
