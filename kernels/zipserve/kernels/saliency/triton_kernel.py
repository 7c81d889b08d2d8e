"""Probe saliency in Triton: first the softmax's divisor of every probe row, then the columns of the rows' own blocks.

Rows are those of all heads of a group, probe by probe, so that keys are read once per KV head. Nothing is summed in an
order that depends on timing: a block's bytes can be made again.
"""

import math

import torch
import triton
import triton.language as tl

from zipserve.kernels.triton_tiles import LOG2_E, LOWEST, logarithms, padded, product

_TOKENS = 32


def probe_scores_triton(
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
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """See zipserve.kernels.saliency.probe_scores."""
    heads = query.shape[0]
    kv_heads, blocks = keys.shape[0], len(starts)
    if lse is None:
        lse = log_sum_exp_triton(query, keys, own, first, scale, softcap, sinks)
    divisors = (lse.T / math.log(2)).contiguous()  # [p, heads]
    query = query.transpose(0, 1).contiguous()  # [p, heads, key_dim]
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    found = torch.empty(kv_heads, blocks, block_tokens, dtype=torch.float32, device=query.device)
    # of each block the first row, and the one behind the last
    limits = torch.searchsorted(block, torch.arange(blocks + 1, device=block.device))
    _column_kernel[blocks, kv_heads, triton.cdiv(block_tokens, _TOKENS)](
        query, keys, keys.stride(0), keys.stride(1), keys.shape[1], own, first, starts, limits, divisors, found,
        block_tokens, scale, softcap, **_sizes(heads, keys), ROWS=16 if query.dtype == torch.float32 else 32,
        num_stages=1,
    )  # fmt: skip
    return found.sum(0) / heads


def log_sum_exp_triton(
    query: torch.Tensor,
    keys: torch.Tensor,
    own: torch.Tensor,
    first: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See zipserve.kernels.saliency.log_sum_exp."""
    heads, probes, _ = query.shape
    query = query.transpose(0, 1).contiguous()  # [p, heads, key_dim]
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    divisors = torch.empty(probes, heads, dtype=torch.float32, device=query.device)
    rows = 16 if query.dtype == torch.float32 else 64  # float32 takes more registers
    _divisor_kernel[triton.cdiv(probes * (heads // keys.shape[0]), rows), keys.shape[0]](
        query, keys, keys.stride(0), keys.stride(1), keys.shape[1], own, first, sinks, divisors, probes, scale,
        softcap, **_sizes(heads, keys), ROWS=rows,
    )  # fmt: skip
    return divisors.T * math.log(2)


def _sizes(heads: int, keys: torch.Tensor) -> dict[str, int]:
    kv_heads, _, key_dim = keys.shape
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "KEY_DIM": key_dim,
        "KEY_PAD": padded(key_dim),
        "TOKENS": _TOKENS,
    }


@triton.jit(do_not_specialize=["count", "probes"])
def _divisor_kernel(
    query, keys, head_stride, key_stride, count, own, first, sinks, divisors, probes, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """log2 of the softmax's divisor of some rows: to divisors [p, heads]."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    probe, valid = rows // GROUP, rows < probes * GROUP
    tile = _load_rows(query, rows, valid, head, KV_HEADS, GROUP, KEY_DIM, KEY_PAD)  # [ROWS, KEY_PAD]
    least = tl.load(first + probe, mask=valid, other=count).to(tl.int32)  # [ROWS]
    last = tl.load(own + probe, mask=valid, other=-1).to(tl.int32)  # [ROWS]
    top, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        logit = tl.load(sinks + head * GROUP + rows % GROUP).to(tl.float32)  # [ROWS]
        top, total = logit * LOG2_E, tl.full([ROWS], 1, tl.float32)
    keys += head.to(tl.int64) * head_stride
    for begin in range(tl.min(least) // TOKENS * TOKENS, tl.max(last) + 1, TOKENS):
        tokens = begin + tl.arange(0, TOKENS)
        key_tile = _load_keys(keys, key_stride, tokens, count, KEY_DIM, KEY_PAD)
        scores = _scores(tile, key_tile, tokens, least, last, scale, softcap)
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        top = higher
    at = probe * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    tl.store(divisors + at, top + tl.log2(tl.where(valid, total, 1)), mask=valid)


@triton.jit(do_not_specialize=["count"])
def _column_kernel(
    query, keys, head_stride, key_stride, count, own, first, starts, limits, divisors, found, block_tokens, scale,
    softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums of the weights of some tokens of a block over its rows and a group's heads.

    To found [kv_heads, b, block_tokens].
    """
    block, head = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    tokens = (tl.load(starts + block) + columns).to(tl.int32)
    key_tile = _load_keys(keys + head.to(tl.int64) * head_stride, key_stride, tokens, count, KEY_DIM, KEY_PAD)
    sums = tl.zeros([TOKENS], tl.float32)
    begin, end = tl.load(limits + block) * GROUP, tl.load(limits + block + 1) * GROUP
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        probe, valid = rows // GROUP, rows < end
        tile = _load_rows(query, rows, valid, head, KV_HEADS, GROUP, KEY_DIM, KEY_PAD)  # [ROWS, KEY_PAD]
        least = tl.load(first + probe, mask=valid, other=count).to(tl.int32)  # [ROWS]
        last = tl.load(own + probe, mask=valid, other=-1).to(tl.int32)  # [ROWS]
        scores = _scores(tile, key_tile, tokens, least, last, scale, softcap)
        at = probe * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
        divisor = tl.load(divisors + at, mask=valid, other=0)  # [ROWS]
        sums += tl.sum(tl.exp2(scores - divisor[:, None]), 0)
    at = (head * tl.num_programs(0) + block).to(tl.int64) * block_tokens + columns
    tl.store(found + at, sums, mask=columns < block_tokens)


@triton.jit
def _load_rows(
    query, rows, valid, head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr,
):  # fmt: skip
    """[rows, KEY_PAD] of the query [p, heads, KEY_DIM]."""
    channels = tl.arange(0, KEY_PAD)
    at = (rows // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    inside = valid[:, None] & (channels < KEY_DIM)[None, :]
    return tl.load(query + at[:, None] * KEY_DIM + channels[None, :], mask=inside, other=0)


@triton.jit
def _load_keys(keys, key_stride, tokens, count, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr):
    """[KEY_PAD, tokens] of a head's keys [count, KEY_DIM]."""
    channels = tl.arange(0, KEY_PAD)
    inside = (channels < KEY_DIM)[:, None] & (tokens < count)[None, :]
    return tl.load(keys + tokens.to(tl.int64)[None, :] * key_stride + channels[:, None], mask=inside, other=0)


@triton.jit
def _scores(tile, key_tile, tokens, least, last, scale, softcap):
    """Scores [rows, tokens] as logarithms to base 2; minus infinity where a row does not see a token."""
    scores = logarithms(product(tile, key_tile.to(tile.dtype)) * scale, softcap)
    visible = (tokens[None, :] >= least[:, None]) & (tokens[None, :] <= last[:, None])
    return tl.where(visible, scores, -float("inf"))
