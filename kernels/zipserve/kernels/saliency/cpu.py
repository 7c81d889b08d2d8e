"""Calls the C kernel of probe saliency."""

import ctypes

import torch

from zipserve.kernels import native


class _Saliency(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "own", "first", "block", "starts", "sinks", "scores")),
        *((name, ctypes.c_int64 * 2) for name in ("query_strides", "key_strides")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "rows", "dim", "blocks", "block_tokens", "threads")),
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
) -> torch.Tensor:
    """See zipserve.kernels.saliency.probe_scores; only where `runs_on_cpu`."""
    library = native.load()
    assert library is not None
    query, keys = _rows(query), _rows(keys)
    own, first, block, starts = (index.long().contiguous() for index in (own, first, block, starts))
    sinks = None if sinks is None else sinks.float().contiguous()
    scores = torch.empty(len(starts), block_tokens)
    arguments = _Saliency(
        query.data_ptr(),
        keys.data_ptr(),
        own.data_ptr(),
        first.data_ptr(),
        block.data_ptr(),
        starts.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        scores.data_ptr(),
        query.stride()[:2],
        keys.stride()[:2],
        query.shape[0],
        keys.shape[0],
        query.shape[1],
        query.shape[2],
        len(starts),
        block_tokens,
        torch.get_num_threads(),
        scale,
        softcap or 0.0,
    )
    if library.zs_saliency(ctypes.byref(arguments)):
        raise MemoryError(f"saliency of {len(starts)} blocks")
    return scores


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As float32 with contiguous rows."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
