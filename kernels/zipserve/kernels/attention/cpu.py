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


class Arguments(ctypes.Structure):
    """struct Attention of attention.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("form", "query", "fresh_keys", "fresh_values")),
        *((name, ctypes.c_void_p) for name in ("sealed", "table", "counts", "starts")),
        *((name, ctypes.c_void_p) for name in ("sinks", "sink_slabs", "open_keys", "open_values", "slots")),
        *((name, ctypes.c_void_p) for name in ("open_counts", "first", "sink_logits", "output", "weights")),
        *((name, ctypes.c_int64) for name in ("sealed_stride", "sinks_stride", "table_stride")),
        *((name, ctypes.c_int64 * 2) for name in ("open_key_strides", "open_value_strides")),
        *((name, ctypes.c_int64 * 2) for name in ("query_strides", "fresh_key_strides", "fresh_value_strides")),
        *((name, ctypes.c_int64) for name in ("slabs", "sinks_slabs", "columns", "open_slots")),
        *((name, ctypes.c_int64) for name in ("sealed_layer", "sinks_layer", "open_key_layer", "open_value_layer")),
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
    weights = torch.empty(len(query), sealed.form.block_tokens) if with_weights else None
    call = Call(query, sealed, open_blocks, first)
    output = call.run(query, fresh, scale=scale, softcap=softcap, sink_logits=sink_logits, weights=weights)
    return output, weights


class Call:
    """What calls for the same rows have in common: it is checked and laid out once, for all layers of a step."""

    def __init__(
        self, query: torch.Tensor, sealed: "SealedBlocks", open_blocks: "OpenBlocks", first: torch.Tensor
    ) -> None:
        """See zipserve.kernels.attention.decode_attention.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        _check(query, sealed, open_blocks, first)
        form, keys, values = sealed.form, open_blocks.keys, open_blocks.values
        self._form, self._rows, self._heads = form, *query.shape[:2]
        self._query_shape = tuple(query.shape)
        self._fresh_shapes = tuple((self._rows, form.kv_heads, dim) for dim in (form.key_dim, form.value_dim))
        of_rows = (sealed.table, sealed.counts, sealed.starts, sealed.sink_slabs, open_blocks.slots, open_blocks.counts)
        self._kept = [_int32(index) for index in (*of_rows, first)]  # alive as long as C may read them
        table, counts, starts, sink_slabs, slots, open_counts, first = self._kept
        size = keys.element_size()
        self.arguments = Arguments(
            form=ctypes.addressof(format_of(form)),
            sealed=sealed.data.data_ptr(),
            table=table.data_ptr(),
            counts=counts.data_ptr(),
            starts=starts.data_ptr(),
            sinks=sealed.sinks.data_ptr(),
            sink_slabs=sink_slabs.data_ptr(),
            open_keys=keys.data_ptr(),
            open_values=values.data_ptr(),
            slots=slots.data_ptr(),
            open_counts=open_counts.data_ptr(),
            first=first.data_ptr(),
            sealed_stride=sealed.data.stride(0),
            sinks_stride=sealed.sinks.stride(0),
            table_stride=table.stride(0),
            open_key_strides=(keys.stride(0) * size, keys.stride(1) * size),
            open_value_strides=(values.stride(0) * size, values.stride(1) * size),
            slabs=sealed.data.shape[0],
            sinks_slabs=sealed.sinks.shape[0],
            columns=table.shape[1],
            open_slots=keys.shape[0],
            rows=self._rows,
            heads=self._heads,
            open_type=TYPES[keys.dtype],
            threads=torch.get_num_threads(),
        )

    def set_layers(self, sealed: int, sinks: int, open_keys: int, open_values: int) -> None:
        """Says how many bytes lie between the blocks of two layers, for C code that computes all of them."""
        arguments = self.arguments
        arguments.sealed_layer, arguments.sinks_layer = sealed, sinks
        arguments.open_key_layer, arguments.open_value_layer = open_keys, open_values

    def move(self, sealed: int, sinks: int, open_keys: int, open_values: int) -> None:
        """Goes on to other blocks of the same shapes and strides, at these addresses: those of the next layer."""
        arguments = self.arguments
        arguments.sealed, arguments.sinks = sealed, sinks
        arguments.open_keys, arguments.open_values = open_keys, open_values

    def run(
        self,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """See zipserve.kernels.attention.DecodeStep.attend.

        Raises:
            ValueError: shapes that do not fit the constructor's query and blocks.
        """
        library = native.load()
        assert library is not None
        arguments = self.arguments
        self.check_heads(query, fresh)
        if sink_logits is not None and sink_logits.shape != (self._heads,):
            raise ValueError(f"sink_logits must be [{self._heads}], not {[*sink_logits.shape]}")
        if weights is not None and weights.shape != (self._rows, self._form.block_tokens):
            raise ValueError(f"weights must be {[self._rows, self._form.block_tokens]}, not {[*weights.shape]}")
        query = _rows(query)
        arguments.query, arguments.query_strides = query.data_ptr(), query.stride()[:2]
        if fresh is not None:
            key, value = _rows(fresh[0]), _rows(fresh[1])
            arguments.fresh_keys, arguments.fresh_key_strides = key.data_ptr(), key.stride()[:2]
            arguments.fresh_values, arguments.fresh_value_strides = value.data_ptr(), value.stride()[:2]
        if sink_logits is not None:
            sink_logits = sink_logits.float().contiguous()
        arguments.sink_logits = None if sink_logits is None else sink_logits.data_ptr()
        arguments.scale, arguments.softcap = scale, softcap or 0.0
        output = torch.empty(self._rows, self._heads, self._form.value_dim)
        arguments.output, arguments.weights = output.data_ptr(), None if weights is None else weights.data_ptr()
        raise_wrong(library.zs_attention(ctypes.byref(arguments)), self._rows)
        return output

    def check_heads(self, query: torch.Tensor, fresh: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """What the kernel takes for granted: shapes as the constructor's query and blocks have them.

        Raises:
            ValueError: they are not.
        """
        if fresh is not None and (fresh[0].shape, fresh[1].shape) != self._fresh_shapes:
            raise ValueError(f"fresh keys and values must be {self._fresh_shapes}, not {[x.shape for x in fresh]}")
        if query.shape != self._query_shape:
            raise ValueError(f"query must be {self._query_shape}, not {query.shape}")


def raise_wrong(found: int, rows: int) -> None:
    """Turns what zs_attention returns into an exception; -1 is fine.

    Raises:
        IndexError, MemoryError: see zipserve.kernels.attention.decode_attention.
    """
    if found == _NO_MEMORY:
        raise MemoryError(f"attention of {rows} rows")
    if found >= 0:
        raise IndexError(f"row {found} refers to a slab or slot that does not exist, or sees no key")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As float32 with contiguous rows: itself, in nearly all cases."""
    x = x.float()
    return x if x.stride(2) == 1 else x.contiguous()


def _check(
    query: torch.Tensor,
    sealed: "SealedBlocks",
    open_blocks: "OpenBlocks",
    first: torch.Tensor,
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
    check("blocks", sealed.data, (sealed.data.shape[0], form.layer_bytes), torch.uint8)
    if isinstance(form, ZipFormat):
        check("sinks", sealed.sinks, (sealed.sinks.shape[0], form.sinks_layer_bytes), torch.uint8)


def _int32(index: torch.Tensor) -> torch.Tensor:
    """Itself, in nearly all cases."""
    return index if index.dtype is torch.int32 and index.is_contiguous() else index.int().contiguous()
