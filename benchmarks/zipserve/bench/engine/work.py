"""What a step must compute and read at least: by this, speeds become shares of the machine's limits."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.common.models import ModelFiles

_ITEM_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8}
STORAGES = tuple(_ITEM_BITS)


@dataclass(frozen=True)
class Work:
    """Of a dense decoder-only model."""

    linear_weights: int
    """Of all linear layers, the head excepted."""
    head_weights: int
    vocab_tokens: int
    layers: int
    heads: int
    """Of queries."""
    head_dim: int

    @classmethod
    def of(cls, files: ModelFiles) -> "Work":
        """From a module without weights."""
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            module = auto.from_config(AutoConfig.from_pretrained(files.folder))
        head, config = module.get_output_embeddings(), module.config.get_text_config()
        linears = [part for part in module.modules() if isinstance(part, torch.nn.Linear) and part is not head]
        heads = config.num_attention_heads
        return cls(
            linear_weights=sum(linear.weight.numel() for linear in linears),
            head_weights=head.weight.numel(),
            vocab_tokens=head.out_features,
            layers=config.num_hidden_layers,
            heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def prefill_flops(self, tokens: int) -> int:
        """Of one prompt: all linears for each token, the head for the last one, attention below the diagonal."""
        pairs = tokens * (tokens + 1) // 2
        attention = 2 * self.layers * self.heads * self.head_dim * pairs
        return 2 * (self.linear_weights * tokens + self.head_weights + attention)

    def weight_bytes(self, storage: str) -> int:
        """Of the weights that every decode step reads; scales and embeddings, of which it reads a row, not counted."""
        return (self.linear_weights + self.head_weights) * _ITEM_BITS[storage] // 8

    def decode_bytes(self, storage: str, layout: Layout, rows: int, context: int) -> int:
        """What one decode step reads: the weights once, and each row's KV."""
        return self.weight_bytes(storage) + rows * kv_bytes(layout, context)


def kv_bytes(layout: Layout, context: int) -> int:
    """Of one sequence: its full blocks, the sinks that go with them, and the open block's tokens as they are."""
    blocks, rest = divmod(context, layout.block_tokens)
    sinks = layout.slab_bytes(SlabKind.SINKS) if blocks and layout.has_sinks else 0
    token = layout.layers * layout.kv_heads * (layout.key_dim + layout.value_dim) * _ITEM_BITS[layout.dtype] // 8
    return blocks * layout.slab_bytes(SlabKind.BLOCK) + sinks + rest * token
