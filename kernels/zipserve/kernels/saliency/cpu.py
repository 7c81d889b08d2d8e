"""Calls the C kernel of probe saliency."""

import ctypes

import torch

from zipserve.kernels import native

_NO_MEMORY = -2


class _Saliency(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "own", "first", "block", "starts")),
        *((name, ctypes.c_void_p) for name in ("sinks", "lse", "scores")),
        *((name, ctypes.c_int64 * 2) for name in ("query_strides", "key_strides")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "rows", "keys_count", "dim")),
        *((name, ctypes.c_int32) for name in ("blocks", "block_tokens", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def runs_on_cpu(query: torch.Tensor) -> bool:
    """Whether `probe_scores_cpu` can do this: the tensors are on the CPU, and the kernel is there."""
    return query.device.type == "cpu" and native.load() is not None


def probe_scores_cpu(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    block: torch.Tensor,
    starts: torch.Tensor,
    block_tokens: int,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """See zipserve.kernels.saliency.probe_scores; only where `runs_on_cpu`."""
    library = native.load()
    assert library is not None
    heads, rows, key_dim = query.shape
    if heads % keys.shape[0] or keys.shape[2] != key_dim or (lse is not None and lse.shape != (heads, rows)):
        raise ValueError(f"query {[*query.shape]} does not fit keys {[*keys.shape]}, or its lse")
    if any(index.shape != (rows,) for index in (own, first, block)) or (sinks is not None and sinks.shape != (heads,)):
        raise ValueError(f"own, first and block must be [{rows}], and sinks [{heads}]")
    query, keys = _rows(query), _rows(keys)
    own, first, block, starts = (index.long().contiguous() for index in (own, first, block, starts))
    sinks = None if sinks is None else sinks.float().contiguous()
    lse = None if lse is None else lse.float().contiguous()
    scores = torch.empty(len(starts), block_tokens)
    arguments = _Saliency(
        query.data_ptr(),
        keys.data_ptr(),
        own.data_ptr(),
        first.data_ptr(),
        block.data_ptr(),
        starts.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        None if lse is None else lse.data_ptr(),
        scores.data_ptr(),
        query.stride()[:2],
        keys.stride()[:2],
        *(heads, keys.shape[0], rows, keys.shape[1], key_dim, len(starts), block_tokens, torch.get_num_threads()),
        *(scale, softcap or 0.0),
    )
    wrong = library.zs_saliency(ctypes.byref(arguments))
    if wrong == _NO_MEMORY:
        raise MemoryError(f"saliency of {len(starts)} blocks")
    if wrong >= 0:
        raise IndexError(f"row {wrong}: no token {int(own[wrong])} or no block {int(block[wrong])} in its order")
    return scores


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As float32 with contiguous rows."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
