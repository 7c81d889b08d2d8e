"""Recognizes a decoder of the llama family in a transformers module: llama, mistral, qwen2/3, gemma2/3, phi3, smollm3 …

Parts are told by their names, and what matters of them by what they do: a norm is one of two formulas that agrees with
the module on random numbers, an activation likewise.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import nn

from zipserve.kernels.decoder import Activation

_ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
_TWO_NORMS = {"input_layernorm", "post_attention_layernorm"}
_FOUR_NORMS = {*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"}
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


class NotRecognizedError(Exception):
    """Something that the plan does not know; the message says what."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: x / rms(x) * weight."""

    weight: torch.Tensor
    """float32 [columns]"""
    eps: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    input_norm: Norm
    projections: list[nn.Linear]
    """Of queries, keys and values, in this order, or one for all of them."""
    query_norm: Norm | None
    key_norm: Norm | None
    rope: int | None
    """Which of the decoder's rotary tables; None: no rotary embedding."""
    output: nn.Linear
    attention_norm: Norm | None
    """Of the attention's output, before it is added."""
    mlp_norm: Norm
    gates: list[nn.Linear]
    """Of gates and factors, in this order, or one for both."""
    activation: Activation
    down: nn.Linear
    down_norm: Norm | None
    """Of the MLP's output, before it is added."""


@dataclass(frozen=True)
class Decoder:
    """A whole decoder."""

    embedding: nn.Embedding
    layers: list[Layer]
    norm: Norm
    head: nn.Linear
    rotary: Any
    """The module that makes the tables of cosines and sines."""
    rope_kinds: list[tuple[str, ...]]
    """What it is called with besides rows and positions, for each table."""
    softcap: float | None
    """Logits become softcap * tanh(logits / softcap)."""


def recognize(module: Any, heads: tuple[int, int, int, int]) -> Decoder:
    """The parts of a causal language model.

    Args:
        heads: query heads, KV heads, key_dim and value_dim.

    Raises:
        NotRecognizedError: there is a part that the plan does not know.
    """
    base = getattr(module, "model", None)
    _expect(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
    assert base is not None
    config = module.config.get_text_config()
    kinds: list[tuple[str, ...]] = [()]
    if "layer_type" in inspect.signature(base.rotary_emb.forward).parameters:
        kinds = [(kind,) for kind in sorted(set(config.layer_types))]
    layers = []
    for index, layer in enumerate(base.layers):
        kind = () if kinds == [()] else (config.layer_types[index],)
        layers.append(_layer(layer, heads[2], kinds.index(kind)))
    _check_widths(layers, heads)
    return Decoder(
        embedding=base.embed_tokens,
        layers=layers,
        norm=norm_of(base.norm),
        head=_linear(getattr(module, "lm_head", None)),
        rotary=base.rotary_emb,
        rope_kinds=kinds,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _layer(layer: Any, key_dim: int, rope: int) -> Layer:
    norms = _expect(layer, *({"self_attn", "mlp", *norms} for norms in (_TWO_NORMS, _FOUR_NORMS)))
    attention, mlp = layer.self_attn, layer.mlp
    _expect(attention, *_ATTENTION, *(names | _HEAD_NORMS for names in _ATTENTION))
    _expect(mlp, *_MLP)
    query_norm, key_norm = (
        norm_of(part) if (part := getattr(attention, name, None)) else None
        for name in sorted(_HEAD_NORMS, reverse=True)
    )
    for norm in (query_norm, key_norm):
        if norm is not None and norm.weight.numel() != key_dim:
            raise NotRecognizedError("a norm over several heads")
    has_four = "pre_feedforward_layernorm" in norms
    return Layer(
        input_norm=norm_of(layer.input_layernorm),
        projections=_linears(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj")),
        query_norm=query_norm,
        key_norm=key_norm,
        rope=rope if getattr(attention, "use_rope", True) else None,
        output=_linear(attention.o_proj),
        attention_norm=norm_of(layer.post_attention_layernorm) if has_four else None,
        mlp_norm=norm_of(layer.pre_feedforward_layernorm if has_four else layer.post_attention_layernorm),
        gates=_linears(mlp, ("gate_up_proj",), ("gate_proj", "up_proj")),
        activation=_activation(mlp),
        down=_linear(mlp.down_proj),
        down_norm=norm_of(layer.post_feedforward_layernorm) if has_four else None,
    )


def _check_widths(layers: list[Layer], heads: tuple[int, int, int, int]) -> None:
    """All layers work on the same rows, whose widths the native code takes for granted."""
    queries, kv_heads, key_dim, value_dim = heads
    hidden, gated = layers[0].output.out_features, layers[0].down.in_features
    projected = (queries + kv_heads) * key_dim + kv_heads * value_dim
    for layer in layers:
        for parts, inputs, outputs in (
            (layer.projections, hidden, projected),
            ([layer.output], queries * value_dim, hidden),
            (layer.gates, hidden, 2 * gated),
            ([layer.down], gated, hidden),
        ):
            if {part.in_features for part in parts} != {inputs} or sum(part.out_features for part in parts) != outputs:
                raise NotRecognizedError(f"layers with other products than {outputs} of {inputs} numbers")
        norms = (layer.input_norm, layer.attention_norm, layer.mlp_norm, layer.down_norm)
        if any(norm is not None and norm.weight.numel() != hidden for norm in norms):
            raise NotRecognizedError(f"norms of other rows than those of {hidden} numbers")


def _expect(part: Any, *known: set[str]) -> set[str]:
    """The names of the children of `part`, which must be one of `known` apart from what has no weights."""
    children = part.named_children() if part is not None else ()
    names = {name for name, child in children if name == "rotary_emb" or next(child.parameters(), None) is not None}
    if names not in known:
        raise NotRecognizedError(f"{type(part).__name__} of {', '.join(sorted(names)) or 'nothing'}")
    return names


def _linears(part: Any, *alternatives: tuple[str, ...]) -> list[nn.Linear]:
    names = next(names for names in alternatives if hasattr(part, names[0]))
    return [_linear(getattr(part, name)) for name in names]


def _linear(part: Any) -> nn.Linear:
    if type(part) is not nn.Linear:
        raise NotRecognizedError(f"a product by {type(part).__name__}")
    return part


def norm_of(part: Any) -> Norm:
    """A module as an RMS norm.

    Raises:
        NotRecognizedError: it is none.
    """
    weight = getattr(part, "weight", None)
    eps = getattr(part, "variance_epsilon", getattr(part, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or getattr(part, "bias", None) is not None:
        raise NotRecognizedError(f"a norm by {type(part).__name__}")
    x = torch.randn(2, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    wanted = part(x).float()
    normal = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    for factors in (weight.detach().float(), weight.detach().float() + 1):
        if torch.allclose(normal * factors, wanted, rtol=2e-2 if weight.itemsize < 4 else 1e-4, atol=1e-5):
            return Norm(factors.clone(), eps)
    raise NotRecognizedError(f"a norm by {type(part).__name__} that is no RMS norm")


def _activation(mlp: Any) -> Activation:
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    x = torch.linspace(-4, 4, 33)
    for activation, known in ACTIVATIONS.items():
        if function is not None and torch.allclose(function(x), known(x), atol=1e-6):
            return activation
    raise NotRecognizedError(f"an activation by {type(function).__name__}")
