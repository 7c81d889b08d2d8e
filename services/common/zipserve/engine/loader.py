"""Loads a Hugging Face causal language model, and finds out by asking it what its KV looks like.

The shapes come from a recorded forward pass, not from the config, whose fields differ from family to family. What the
packed row cannot serve is refused here with a reason: attention that does not come to us, state besides KV, and rotary
embeddings that depend on the longest sequence of a batch. `probe.py` then checks what no list of reasons can know.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import MODEL_DTYPES
from zipserve.common.models import ModelFiles
from zipserve.engine.attention import IMPLEMENTATION, Scoring, Zeros, attending
from zipserve.engine.codec import TORCH_DTYPES
from zipserve.engine.model import LoadedModel, ModuleForward

__all__ = ["LoadedModel", "load", "wrap"]

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_KV_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def load(files: ModelFiles, dtype: str, device: str, context_tokens: int | None = None) -> LoadedModel:
    """Loads a model's weights. `probe` is to check it before it serves.

    Args:
        dtype: float32, float16 or bfloat16.
        context_tokens: longest sequence to serve, if less than the model can do.

    Raises:
        InvalidRequestError: it cannot be served; the message says why.
    """
    if dtype not in MODEL_DTYPES:
        raise InvalidRequestError(f"dtype {dtype!r} is unknown; known: {', '.join(MODEL_DTYPES)}", field="dtype")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=TORCH_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"transformers cannot load {files.folder}: {error}", field="model") from error
    module, info = loaded
    # transformers would go on with random weights.
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise InvalidRequestError(f"model {files.name} lacks weights: {', '.join(lacking[:5])} …", field="model")
    return wrap(module.to(device), files.name, files.revision, context_tokens)


def wrap(module: Any, name: str, revision: str, context_tokens: int | None = None) -> LoadedModel:
    """Takes over a module that has been constructed: eval mode, our attention.

    Raises:
        InvalidRequestError: it cannot be served; the message says why.
    """
    context = _context_tokens(module, name, context_tokens)
    _refuse_state(module, name)
    _refuse_batch_dependent_rope(module, name, context)
    parameter = next(module.parameters())
    dtype = next((name for name in MODEL_DTYPES if TORCH_DTYPES[name] == parameter.dtype), None)
    if dtype is None:
        raise InvalidRequestError(f"model {name} has weights of {parameter.dtype}", field="model")
    module.eval()
    module.set_attn_implementation(IMPLEMENTATION)
    recorder, forward = _Recorder(), ModuleForward(module)
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=parameter.device)
    positions = torch.arange(2, device=parameter.device)
    with attending(recorder), torch.inference_mode():
        vocab = forward(tokens, positions[None], positions[1:]).shape[1]
    kv_heads, key_dim, value_dim = recorder.shape(name)
    return LoadedModel(
        module=module,
        forward=forward,
        name=name,
        revision=revision,
        dtype=dtype,
        device=parameter.device,
        parameters=sum(each.numel() for each in module.parameters()),
        vocab_tokens=vocab,
        context_tokens=context,
        eos_token_ids=_eos_token_ids(module),
        layers=len(recorder.shapes),
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        heads=recorder.heads,
        scorings=tuple(recorder.scorings),
    )


class _Recorder(Zeros):
    """Takes note of the KV of every layer."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, tuple[int, int, int]]] = []
        self.scorings: list[Scoring] = []
        self.heads = 0

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See zipserve.engine.attention.Attender."""
        self.shapes.append((layer, (key.shape[0], key.shape[2], value.shape[2])))
        self.scorings.append(scoring)
        self.heads = query.shape[0]
        return super().attend(layer, query, key, value, scoring)

    def shape(self, name: str) -> tuple[int, int, int]:
        """kv_heads, key_dim and value_dim of all layers."""
        if not self.shapes:
            raise InvalidRequestError(
                f"model {name} bypasses the attention interface of transformers: none of its layers called zipserve",
                field="model",
            )
        if [layer for layer, _ in self.shapes] != list(range(len(self.shapes))):
            layers = [layer for layer, _ in self.shapes]
            raise InvalidRequestError(f"model {name} attends in layers {layers}, not once in each", field="model")
        shapes = {shape for _, shape in self.shapes}
        if len(shapes) > 1:
            raise InvalidRequestError(
                f"model {name} has layers of different (kv_heads, key_dim, value_dim): {sorted(shapes)}", field="model"
            )
        return shapes.pop()


def _context_tokens(module: Any, name: str, wanted: int | None) -> int:
    config = module.config.get_text_config()
    able: int | None = next((value for field in _CONTEXT_FIELDS if (value := getattr(config, field, None))), None)
    context = able if wanted is None else wanted
    if context is None:
        raise InvalidRequestError(f"model {name} does not say how long its context is: set one", field="context_tokens")
    if able is not None and context > able:
        raise InvalidRequestError(f"model {name} has a context of {able} tokens, not {context}", field="context_tokens")
    return context


def _refuse_state(module: Any, name: str) -> None:
    """Layers that carry state besides KV know nothing of the sequences in a packed row."""
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ()) - _KV_LAYER_TYPES
    stateful = [type(part).__name__ for part in module.modules() if getattr(part, "_is_stateful", False)]
    if kinds or stateful:
        what = ", ".join(sorted(kinds)) or stateful[0]
        raise InvalidRequestError(
            f"model {name} keeps state besides its KV cache ({what}), which zipserve cannot move", field="model"
        )


def _refuse_batch_dependent_rope(module: Any, name: str, context_tokens: int) -> None:
    """These rope types choose their frequencies by the longest sequence of the row, for all of it."""
    config = module.config.get_text_config()
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        # Up to the length of the original training, both keep to one set of frequencies.
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if context_tokens > original:
            raise InvalidRequestError(
                f"model {name} has {kind} rotary embeddings, by which one long request would change the others; "
                f"it can be served with a context of up to {original} tokens, not {context_tokens}",
                field="context_tokens",
            )


def _rope_parameters(config: Any) -> Iterable[dict[str, Any]]:
    """The rope parameters of a config: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [value for value in parameters.values() if isinstance(value, dict)]
    return sets or [parameters]


def _eos_token_ids(module: Any) -> tuple[int, ...]:
    generation = getattr(module, "generation_config", None)
    for config in (generation, module.config, module.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(sorted(set(ids)))
    return ()
