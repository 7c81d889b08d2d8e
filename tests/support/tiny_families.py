"""Tiny random models of any family, their weights enlarged so that attention decides the tokens."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(family: str, **settings: Any) -> Any:
    """A model of the family, always the same one.

    Args:
        family: `model_type` of a config of transformers.
        settings: of the config, beside or instead of the common ones; None leaves a common one out.
    """
    torch.manual_seed(0)
    families: Any = AutoModelForCausalLM
    chosen = {name: value for name, value in {**_COMMON, **settings}.items() if value is not None}
    module = families.from_config(AutoConfig.for_model(family, **chosen))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)
    return module.eval()
