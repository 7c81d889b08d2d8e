"""Prefill attention: the new tokens of one sequence over its sealed blocks, as they are, and each other.

On the CPU zipped blocks are unpacked strip by strip and not rotated back; the queries are rotated instead. Elsewhere
they are dequantized for torch's own attention. Grouped-query, windows, softcap and sink logits included.
"""

from dataclasses import dataclass

import torch

from zipserve.kernels.attention import RawFormat
from zipserve.kernels.prefill_attention.cpu import prefill_attention_cpu, runs_on_cpu
from zipserve.kernels.prefill_attention.dense import prefill_attention_dense
from zipserve.kernels.prefill_attention.reference import prefill_attention_reference
from zipserve.kernels.zipformat import ZipFormat

__all__ = ["Prefix", "prefill_attention", "prefill_attention_reference"]


@dataclass(frozen=True)
class Prefix:
    """One layer of the sealed blocks of a sequence that stand right before the new keys."""

    form: ZipFormat | RawFormat
    data: torch.Tensor
    """uint8 [slabs, form.layer_bytes]: this layer in all slabs; a view with any stride between slabs."""
    slabs: torch.Tensor
    """int64 [n], ascending positions."""
    sinks: torch.Tensor
    """uint8 [slabs, form.sinks_layer_bytes], likewise; ignored by RawFormat."""
    sink_slabs: torch.Tensor
    """int64 [n]: for a block at position 0 the slab of its sinks, else -1; ignored by RawFormat."""

    @property
    def tokens(self) -> int:
        """Of all blocks."""
        return len(self.slabs) * self.form.block_tokens


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    *,
    scale: float,
    prefix: Prefix | None = None,
    first: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    lse_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention of a sequence's new tokens.

    Their keys are the last ones of `key`; those before them are of tokens that are computed but not sealed yet. The
    prefix ends where `key` begins. Any float dtype and strides; on the CPU nothing is copied whose last stride is 1.

    Args:
        query: [heads, tokens, key_dim]; heads is a multiple of kv_heads.
        key: [kv_heads, n, key_dim], n from `tokens` on.
        value: [kv_heads, n, value_dim].
        start: position of the first new token.
        scale: of the products.
        prefix: where anything is sealed that a query sees.
        first: int32 [tokens], not descending: lowest position that each query sees; None: all of them see everything.
        softcap: scores s become softcap * tanh(s / softcap).
        sink_logits: [heads]: one more logit per head that takes part in the softmax and has no value.
        lse_rows: int64 [p]: the queries whose log-sum-exp is wanted.

    Returns:
        float32 [tokens, heads, value_dim]; and, with `lse_rows`, float32 [heads, p]: the natural logarithm of the sum
        of e^score over all that the query sees, its sink logit included.

    Raises:
        ValueError: shapes that do not fit each other, or a query that sees nothing.
        IndexError: a slab or a row does not exist.
    """
    _check(query, key, value, start, prefix, first, sink_logits, lse_rows)
    attend = prefill_attention_cpu if runs_on_cpu(query, prefix) else prefill_attention_dense
    return attend(
        query, key, value, start, scale=scale, prefix=prefix, first=first, softcap=softcap, sink_logits=sink_logits,
        lse_rows=lse_rows,
    )  # fmt: skip


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    prefix: Prefix | None,
    first: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    lse_rows: torch.Tensor | None,
) -> None:
    heads, tokens, key_dim = query.shape
    kv_heads, keys, value_dim = value.shape
    if key.shape != (kv_heads, keys, key_dim) or heads % kv_heads or not 0 < tokens <= keys:
        raise ValueError(f"query {[*query.shape]} does not fit key {[*key.shape]} and value {[*value.shape]}")
    before = start + tokens - keys
    sealed = 0 if prefix is None else prefix.tokens
    if not sealed <= before:
        raise ValueError(f"{sealed} sealed tokens do not fit in the {before} positions before the keys")
    for name, given, shape in (("first", first, (tokens,)), ("sink_logits", sink_logits, (heads,))):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {[*shape]}, not {[*given.shape]}")
    if first is None and sealed < before:
        raise ValueError(f"every query sees everything, but {before - sealed} positions have no keys")
    if prefix is not None:
        form = prefix.form
        if (form.kv_heads, form.key_dim, form.value_dim) != (kv_heads, key_dim, value_dim):
            raise ValueError(f"blocks of {form} do not fit key {[*key.shape]} and value {[*value.shape]}")
        if prefix.data.shape[1] != form.layer_bytes or prefix.slabs.shape != prefix.sink_slabs.shape:
            raise ValueError(f"blocks {[*prefix.data.shape]}, or their sinks' slabs, do not fit {form}")
    if lse_rows is not None and lse_rows.ndim != 1:
        raise ValueError(f"lse_rows must have one dimension, not {lse_rows.ndim}")
