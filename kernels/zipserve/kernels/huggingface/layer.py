"""One layer of a ZipCache: sealed blocks in the zip format, the tokens behind them as they came, and their saliency."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from zipserve.kernels.dequantize import dequantize
from zipserve.kernels.quantize import NON_FINITE, quantize
from zipserve.kernels.saliency import classify, probe_scores
from zipserve.kernels.zipformat import ZipFormat, probe_offsets


class ZipLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """One layer of a ZipCache. All rows of the batch are equally long, as everywhere in transformers."""

    is_croppable = True  # what the last call brought is never sealed

    keys: torch.Tensor
    """[batch, kv_heads, tokens, key_dim]: those behind the last sealed block, as they came."""
    values: torch.Tensor
    """[batch, kv_heads, tokens, value_dim], likewise."""

    def __init__(self, index: int, profile: str, block_tokens: int, *, keep_decoded: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self._profile, self._block_tokens = index, profile, block_tokens
        self._keep_decoded = keep_decoded
        self._offsets = probe_offsets(block_tokens)
        self.observed = 0
        """Tokens whose queries have been seen."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes shapes, dtype and device from the first tokens."""
        batch, kv_heads, _, key_dim = key_states.shape
        self.form = ZipFormat(kv_heads, key_dim, value_states.shape[-1], self._block_tokens, self._profile)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        device = key_states.device
        self.blocks = torch.empty(batch, 0, self.form.layer_bytes, dtype=torch.uint8, device=device)
        """uint8 [batch, blocks, layer_bytes]: the sealed ones."""
        self.sinks = torch.empty(batch, 0, dtype=torch.uint8, device=device)
        """uint8 [batch, sinks_layer_bytes], once block 0 is sealed."""
        # Softmax weights of the open blocks' probe rows. Not their sum: after a crop, some rows are replaced.
        self._weights = torch.zeros(batch, 0, len(self._offsets), self._block_tokens, device=device)
        self._decoded = self.keys, self.values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Seals the blocks that are complete, then appends the new tokens.

        Args:
            key_states: [batch, kv_heads, new tokens, key_dim], after rotary embedding.
            value_states: [batch, kv_heads, new tokens, value_dim].

        Returns:
            Keys and values of all tokens, those of sealed blocks decoded.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._seal()
        self.keys = torch.cat((self.keys, key_states), -2)
        self.values = torch.cat((self.values, value_states), -2)
        open_blocks = -(-self.keys.shape[-2] // self._block_tokens)
        self._weights = _padded(self._weights, open_blocks)
        decoded = self._decoded if self._keep_decoded else self._decode(0)
        keys, values = torch.cat((decoded[0], self.keys), -2), torch.cat((decoded[1], self.values), -2)
        keys.zip_layer = self  # type: ignore[attr-defined]  # attention is given this tensor, and nothing else of us
        return keys, values

    @torch.no_grad()
    def observe(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Scores the probe rows among the queries of the tokens that `update` has just appended.

        Args:
            query: [batch, heads, new tokens, key_dim].
            keys: [batch, kv_heads, tokens, key_dim]: what `update` returned.
            mask: [batch or 1, heads or 1, new tokens, at least tokens], bool (True is seen) or what is added to the
                products; of each row its first visible key counts. None: all up to the row's own.
            scale: of the products.
            softcap: as in saliency.probe_scores.
            sinks: as in saliency.probe_scores.
        """
        length, start = keys.shape[2], keys.shape[2] - query.shape[2]
        if start != self.observed:
            return  # a layer that shares these keys comes after their owner, which counts
        self.observed = length
        for block in range(start // self._block_tokens, -(-length // self._block_tokens)):
            first_token = block * self._block_tokens
            probes = [i for i, offset in enumerate(self._offsets) if start <= first_token + offset < length]
            if not probes:
                continue
            own = torch.tensor([first_token + self._offsets[i] for i in probes], device=keys.device)
            first, blind = _first_seen(mask, own - start, own, len(query))
            each = torch.arange(len(own), device=keys.device)
            seen = slice(0, first_token + self._block_tokens)
            weights = torch.stack(
                [
                    probe_scores(
                        query[row, :, own - start], keys[row, :, seen], own, first[row], each,
                        torch.full_like(own, first_token), self._block_tokens, scale, softcap, sinks,
                    )  # every row as a block of its own
                    for row in range(len(query))
                ]
            )  # fmt: skip
            self._weights[:, block - self.blocks.shape[1], probes] = weights.masked_fill(blind[..., None], 0.0)

    def get_seq_length(self) -> int:
        """Tokens of a row."""
        return self.blocks.shape[1] * self._block_tokens + self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the next `query_length` tokens are given, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values of the layer."""
        if not self.is_initialized:
            return 0
        return self.blocks.nbytes + self.sinks.nbytes + self.keys.nbytes + self.values.nbytes

    @property
    def numel(self) -> int:
        """Key and value elements of the layer."""
        if not self.is_initialized:
            return 0
        per_token = self.form.kv_heads * (self.form.key_dim + self.form.value_dim)
        return len(self.keys) * self.get_seq_length() * per_token

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens.

        Raises:
            ValueError: the number is positive, or some of the tokens are sealed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        kept = self.keys.shape[-2] + tokens_to_remove
        if kept < 0:
            raise ValueError(
                f"layer {self.index}: {-tokens_to_remove} tokens cannot be removed, only the last "
                f"{self.keys.shape[-2]} of {self.get_seq_length()} are not sealed"
            )
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.observed = min(self.observed, self.get_seq_length())

    def reset(self) -> None:
        """Drops all tokens."""
        self.is_initialized, self.observed = False, 0
        for name in ("keys", "values", "blocks", "sinks", "_weights", "_decoded"):
            setattr(self, name, None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes row beam_idx[i] the new row i."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes `repeats` rows of each."""
        if self.is_initialized:
            self._select(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows."""
        self._select(indices)

    def _select(self, rows: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows.to(self.keys.device)
        for name in ("keys", "values", "blocks", "sinks", "_weights"):
            setattr(self, name, getattr(self, name)[rows])
        self._decoded = self._decoded[0][rows], self._decoded[1][rows]

    @torch.no_grad()
    def _seal(self) -> None:
        """Zips the complete blocks."""
        batch, (start, count) = len(self.keys), (self.blocks.shape[1], self.keys.shape[-2] // self._block_tokens)
        if count == 0:
            return
        tokens = count * self._block_tokens
        keys, values = (
            kept[:, :, :tokens]
            .reshape(batch, self.form.kv_heads, count, self._block_tokens, -1)
            .transpose(1, 2)
            .flatten(0, 1)
            for kept in (self.keys, self.values)
        )
        sinks = self.sinks if start else self.sinks.new_empty(batch, self.form.sinks_layer_bytes)
        sink_slabs = self._sink_slabs(start, count)
        hi = classify(self._weights[:, :count].sum(2).flatten(0, 1), self.form, sink_slabs >= 0)
        blocks = self.blocks.new_empty(batch * count, self.form.layer_bytes)
        slabs = torch.arange(len(blocks), device=blocks.device)
        status = quantize(keys, values, hi, self.form, blocks, slabs, sinks, sink_slabs)
        if status.any():
            self._refuse(status.view(batch, count), start)
        self.blocks, self.sinks = torch.cat((self.blocks, blocks.view(batch, count, -1)), 1), sinks
        self.keys, self.values = self.keys[:, :, tokens:], self.values[:, :, tokens:]
        self._weights = self._weights[:, count:]
        if self._keep_decoded:
            keys, values = self._decode(start)
            self._decoded = torch.cat((self._decoded[0], keys), 2), torch.cat((self._decoded[1], values), 2)

    def _decode(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the sealed blocks from `start` on, in the model's dtype."""
        data = self.blocks[:, start:]
        batch, count = data.shape[:2]
        if count == 0:
            return self.keys[:, :, :0], self.values[:, :, :0]
        slabs = torch.arange(batch * count, device=data.device)
        decoded = dequantize(data.flatten(0, 1), slabs, self.form, self.sinks, self._sink_slabs(start, count))
        keys, values = (part.view(batch, count, *part.shape[1:]).transpose(1, 2).flatten(2, 3) for part in decoded)
        return keys.to(self.keys.dtype), values.to(self.values.dtype)

    def _sink_slabs(self, start: int, count: int) -> torch.Tensor:
        """int64 [batch * count]: for block 0 of each row the row, for others -1."""
        slabs = torch.full((len(self.keys), count), -1, device=self.keys.device)
        if start == 0:
            slabs[:, 0] = torch.arange(len(self.keys))
        return slabs.flatten()

    def _refuse(self, status: torch.Tensor, start: int) -> None:
        row, block = status.nonzero()[0].tolist()
        first = (start + block) * self._block_tokens
        reason = "are not finite" if status[row, block] == NON_FINITE else "are larger than the zip format can hold"
        raise ValueError(
            f"layer {self.index}, row {row}: keys or values of tokens {first} to {first + self._block_tokens - 1} "
            f"{reason}"
        )


def _padded(weights: torch.Tensor, blocks: int) -> torch.Tensor:
    """Weights [batch, .., probes, block_tokens] of so many blocks, the new ones 0."""
    batch, present, *rest = weights.shape
    return torch.cat((weights, weights.new_zeros(batch, blocks - present, *rest)), 1) if blocks > present else weights


def _first_seen(
    mask: torch.Tensor | None, rows: torch.Tensor, own: torch.Tensor, batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first key that each row sees, and whether it sees none (then of its own): int64, bool [batch, p]."""
    if mask is None:
        return torch.zeros(batch, len(own), dtype=torch.int64, device=own.device), own.expand(batch, -1) < 0
    seen = mask[:, 0, rows].expand(batch, -1, -1)
    if seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min
    blind = ~seen.any(-1)
    return torch.where(blind, own, seen.int().argmax(-1)), blind
