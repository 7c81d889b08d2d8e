"""Lets a ZipCache see the queries: attention functions that call transformers' own and hand the queries on.

A cache is not given queries, and transformers dispatches attention by the name in the config. So each of our names
stands for one of its attentions, and the keys, which come from the cache, carry the layer that wants to know.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zipserve.kernels.huggingface.layer import ZipLayer
from zipserve.kernels.zipformat import PROFILES

CLASSLESS = [name for name, profile in PROFILES.items() if not profile.has_classes]
"""Profiles that need no saliency."""
IMPLEMENTATIONS = {"sdpa": "zip_sdpa", "eager": "zip_eager"}
"""By the attention that a model runs with, the one that also shows its queries to the cache."""


def show_queries(config: PreTrainedConfig, profile: str) -> None:
    """Switches the config's attention to the one that shows its queries.

    Raises:
        ValueError: there is none for it.
    """
    present = config._attn_implementation  # noqa: SLF001  models read this very name, and there is no public one
    if present in IMPLEMENTATIONS.values():
        return
    if present not in IMPLEMENTATIONS:
        raise ValueError(
            f"profile {profile} needs a look at the queries, which ZipCache has under the attention implementations "
            f"{' and '.join(IMPLEMENTATIONS)}, not under {present!r}. Pass the config of a model that has been made, "
            f"after model.set_attn_implementation('sdpa'), or take a profile without classes "
            f"({', '.join(CLASSLESS)})"
        )
    config._attn_implementation = IMPLEMENTATIONS[present]  # noqa: SLF001


def _observe(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]) -> None:
    layer: ZipLayer | None = getattr(key, "zip_layer", None)
    if layer is None:
        return  # another cache, or none
    if options.get("position_bias") is not None or options.get("is_causal") is False:
        raise ValueError("ZipCache cannot tell the saliency of attention with position biases, or that is not causal")
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer.observe(query, key, mask, scale, options.get("softcap"), options.get("s_aux"))


def _sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> Any:
    _observe(query, key, mask, options)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)


def _eager(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> Any:
    _observe(query, key, mask, options)
    return _eager_of(type(module))(module, query, key, value, mask, **options)


def _eager_of(kind: type) -> Callable[..., Any]:
    """A family's own eager attention: it stands beside the attention's class and is registered nowhere."""
    for owner in kind.__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules[owner.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"{kind.__name__} has no eager attention that ZipCache can find; take sdpa")


def _whole_sdpa_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask of sdpa, always written out: some families cut rows off it where the attention is not named sdpa."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


for _name, _attention, _mask in (("sdpa", _sdpa, _whole_sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(IMPLEMENTATIONS[_name], _attention)
    AttentionMaskInterface.register(IMPLEMENTATIONS[_name], _mask)
