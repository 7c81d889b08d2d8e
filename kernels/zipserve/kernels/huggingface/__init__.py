"""The zip format under any Hugging Face decoder: a transformers cache whose complete blocks are zipped.

    from zipserve.kernels.huggingface import ZipCache

    cache = ZipCache(model.config, profile="4/32")
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=200)
    print(f"{cache.bits_per_value():.2f} bits per value")

It is for quality, with other people's harnesses, and not for speed: sealed blocks are decoded on every call. As in the
server, the tokens of one call attend to each other exactly; a block that is complete after a call is sealed before the
next one, which sees it quantized. So a text that is scored in one call never meets a quantized key: split it, context
first. Tokens behind the last complete block stay as they came.

Saliency needs queries, which a cache is not given. Where the profile has classes, `ZipCache(config)` therefore switches
the config's attention from `sdpa` or `eager` to a function that calls the same one and shows the queries to the cache;
models run unchanged under it, with any cache. Left padding counts as tokens: it takes the place of sinks, and widens
the range of keys in the blocks that it shares with text. For figures to report, run rows of equal length.
"""

from typing import Any

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, get_layer_types_and_kwargs

from zipserve.kernels.huggingface.attention import CLASSLESS, IMPLEMENTATIONS, show_queries
from zipserve.kernels.huggingface.layer import ZipLayer
from zipserve.kernels.zipformat import PROFILES, ZipFormat

__all__ = ["ZipCache", "ZipLayer"]

_CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class ZipCache(Cache):
    """Keys and values of a batch: complete blocks in the zip format, the tokens behind them in the model's dtype.

    Every layer keeps all tokens; windows are the mask's affair. Give one cache per call of `generate`, or `reset` it.

    Args:
        config: of the model that will run with the cache, the very object: `model.config`.
        profile: name of the bits, a key of zipformat.PROFILES.
        block_tokens: tokens of a block, a multiple of 64.
        keep_decoded: keep decoded copies of sealed blocks in the model's dtype. Same results, faster, more memory.

    Raises:
        ValueError: a profile or block size that the format does not know; a model whose layers keep something else than
            keys and values; an attention that does not show its queries. Later, from a forward call: head sizes that
            the format does not know; keys or values that it cannot hold, with their layer and tokens.
        RuntimeError: from a forward call, where a profile has classes: the switched attention was not called with the
            cache's keys. Some families have an attention of their own, or cache something else than keys.
    """

    def __init__(
        self, config: PreTrainedConfig, profile: str = "4/32", block_tokens: int = 128, *, keep_decoded: bool = False
    ) -> None:
        ZipFormat(1, 16, 16, block_tokens, profile)  # refuses what it does not know
        if config.is_encoder_decoder:
            raise ValueError("ZipCache is for decoders, not for encoder-decoder models")
        decoder = config.get_text_config(decoder=True)
        kinds, _ = get_layer_types_and_kwargs(decoder)
        if others := sorted(set(kinds) - _CACHED_LAYERS - {"dummy"}):
            raise ValueError(f"ZipCache is for layers that keep keys and values, not for {', '.join(others)}")
        self._has_classes = PROFILES[profile].has_classes
        if self._has_classes:
            show_queries(decoder, profile)
        layers: list[Any] = [
            # a layer that reuses another one's keys keeps none
            DummyLayer()  # type: ignore[no-untyped-call]
            if kind == "dummy"
            else ZipLayer(index, profile, block_tokens, keep_decoded=keep_decoded)
            for index, kind in enumerate(kinds)
        ]
        super().__init__(layers=layers)
        self._latest: ZipLayer | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens to a layer; see ZipLayer.update."""
        # Before the next layer runs, so that nothing is answered by a model whose attention went its own way.
        if self._latest is not None:
            self._require_observed(self._latest)
        layer = self.layers[layer_idx]
        self._latest = layer if isinstance(layer, ZipLayer) else None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def zip_layers(self) -> list[ZipLayer]:
        """The layers that keep keys and values of their own."""
        return [layer for layer in self.layers if isinstance(layer, ZipLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values: codes, parameters, class maps, sinks and open tokens.

        Decoded copies and the attention weights that wait for a block's end are not counted.
        """
        return sum(layer.nbytes for layer in self.zip_layers)

    def bits_per_value(self) -> float:
        """`nbytes` in bits over the number of key and value elements that they stand for; NaN while empty."""
        values = sum(layer.numel for layer in self.zip_layers)
        return 8 * self.nbytes / values if values else float("nan")

    def _require_observed(self, layer: ZipLayer) -> None:
        length = layer.get_seq_length()
        if self._has_classes and layer.observed != length:
            raise RuntimeError(
                f"layer {layer.index}: tokens {layer.observed} to {length - 1} have no saliency, because no attention "
                f"under {' or '.join(IMPLEMENTATIONS.values())} was given their keys as the cache returned them. Call "
                "ZipCache(model.config) with the model's own config and leave its attention as it is then. Families "
                "with an attention of their own, or that cache something else than keys, need a profile without "
                f"classes ({', '.join(CLASSLESS)})"
            )
