"""What the loader finds out about a module, and what it and the probe refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from zipserve.common.errors import InvalidRequestError
from zipserve.common.models import resolve
from zipserve.engine import attention, loader
from zipserve.engine.attention import Scoring, Visibility
from zipserve.engine.loader import load, wrap
from zipserve.engine.probe import probe

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
LATENT = {
    **EXPERTS,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [2.0] * 8,
    "short_factor": [1.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    families: Any = AutoModelForCausalLM
    module = families.from_config(AutoConfig.for_model(family, **{**COMMON, **settings}))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as transformers writes it."""
    module = tiny("llama", num_hidden_layers=2)
    module.generation_config.eos_token_id = [7, 2]
    module.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_shapes_are_discovered() -> None:
    module = tiny("deepseek_v3", **LATENT)
    model = wrap(module, "deepseek", "12ab")
    assert (model.layers, model.kv_heads, model.key_dim, model.value_dim) == (4, 4, 32, 24)
    assert (model.vocab_tokens, model.context_tokens, model.eos_token_ids) == (97, 256, (2,))
    layout = model.layout(block_tokens=16)
    assert layout.description == "deepseek@12ab 4 layers x 4 heads x 32/24 float32 raw block 16 rank 0/1 v2"
    assert not module.training


def test_context_may_be_shortened_only() -> None:
    module = tiny("llama")
    assert wrap(module, "tiny", "0", context_tokens=100).context_tokens == 100
    with pytest.raises(InvalidRequestError, match="has a context of 256 tokens, not 257"):
        wrap(module, "tiny", "0", context_tokens=257)


@pytest.mark.parametrize("family", ["falcon", "bloom", "gptj", "mpt"])
def test_refuses_attention_that_does_not_come_to_us(family: str) -> None:
    """transformers takes the setting without an error, and goes on with the family's own attention."""
    with pytest.raises(InvalidRequestError, match=f"model {family} bypasses the attention interface"):
        wrap(tiny(family, n_embd=64, n_head=4, n_layer=2, rotary_dim=8, d_model=64, n_heads=4), family, "0")


HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    "rwkv": {},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_refuses_state_besides_kv(family: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"model {family} keeps state besides its KV cache"):
        wrap(tiny(family, **HYBRIDS[family]), family, "0")


def test_refuses_layers_of_different_shapes() -> None:
    with pytest.raises(InvalidRequestError, match="layers of different"):
        wrap(tiny("gemma4_text", head_dim=16, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8), "x", "0")


@pytest.mark.parametrize(
    ("family", "settings"), [("phi3", {"original_max_position_embeddings": 64}), ("llama", {})], ids=["phi3", "llama"]
)
def test_rope_that_depends_on_the_batch(family: str, settings: dict[str, Any]) -> None:
    module = tiny(family, rope_parameters=LONGROPE, **settings)
    with pytest.raises(InvalidRequestError, match=r"longrope rotary .* up to 64 tokens, not 256"):
        wrap(module, family, "0")
    probe(wrap(module, family, "0", context_tokens=64))


def test_dynamic_rope_within_its_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    probe(wrap(tiny("llama", rope_parameters=rope), "tiny", "0"))


def test_loads_a_folder(folder: Path) -> None:
    files = resolve(str(folder))
    model = load(files, "float32", "cpu")
    probe(model)
    assert (model.name, model.revision, model.dtype) == ("tiny", files.revision, "float32")
    assert (model.layers, model.kv_heads, model.key_dim, model.value_dim) == (2, 2, 16, 16)
    assert model.eos_token_ids == (2, 7), "generation_config comes before config"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loads_half_precision(folder: Path, dtype: str) -> None:
    model = load(resolve(str(folder)), dtype, "cpu")
    probe(model)
    assert model.layout().dtype == dtype
    assert next(model.module.parameters()).dtype == getattr(torch, dtype)


def test_refuses_weights_that_are_missing(folder: Path) -> None:
    """transformers would draw random ones."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequestError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(resolve(str(folder)), "float32", "cpu")


def test_refuses_what_cannot_be_loaded(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="dtype 'int8' is unknown"):
        load(resolve(str(folder)), "int8", "cpu")
    (folder / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(InvalidRequestError, match="transformers cannot load"):
        load(resolve(str(folder)), "float32", "cpu")


PROBED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "gemma2": {"sliding_window": 4096, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16, "head_dim": 16},
    "gpt_oss": {**EXPERTS, "sliding_window": 128},
    "llama4_text": {**EXPERTS, "attention_chunk_size": 8192, "intermediate_size_mlp": 96},
}


@pytest.mark.parametrize("family", PROBED)
def test_probe_leaves_the_module_as_it_was(family: str) -> None:
    module = tiny(family, **PROBED[family])
    before = (module.config.to_dict(), [getattr(part, "sliding_window", None) for part in module.modules()])
    probe(wrap(module, family, "0"))
    after = (module.config.to_dict(), [getattr(part, "sliding_window", None) for part in module.modules()])
    assert after == before
    assert module.config._attn_implementation == attention.IMPLEMENTATION


def _without(**fields: Any) -> Callable[[Scoring], Scoring]:
    def change(scoring: Scoring) -> Scoring:
        return Scoring(**{**vars(scoring), **fields})

    return change


MISTAKES = {
    "scale": ("llama", _without(scale=1.0)),
    "window": ("mistral", _without(visibility=Visibility())),
    "window by one": ("mistral", _without(visibility=Visibility(window=9))),
    "softcap": ("gemma2", _without(softcap=None)),
    "sinks": ("gpt_oss", _without(sinks=None)),
    "chunks": ("llama4_text", _without(visibility=Visibility())),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_probe_notices(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that a family could express where we do not look."""
    family, change = MISTAKES[mistake]
    model = wrap(tiny(family, **PROBED[family]), family, "0")
    real = attention._scoring
    monkeypatch.setattr(attention, "_scoring", lambda *args: change(real(*args)))
    with pytest.raises(InvalidRequestError, match="gives other logits through the engine"):
        probe(model)


def test_probe_notices_state_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hybrid that no list knows: its attention layers all come to us, its other state does not."""
    monkeypatch.setattr(loader, "_refuse_state", lambda *_: None)
    model = wrap(tiny("falcon_h1", **HYBRIDS["falcon_h1"]), "hybrid", "0")
    with pytest.raises(InvalidRequestError, match="gives other logits through the engine"):
        probe(model)


def test_probe_notices_a_layer_that_mixes_neighbours() -> None:
    module = tiny("llama")

    def mix(_layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(1, dims=1) * (torch.arange(output.shape[1]) > 0)[:, None]

    module.model.layers[1].mlp.register_forward_hook(mix)
    with pytest.raises(InvalidRequestError, match="gives other logits through the engine"):
        probe(wrap(module, "mixing", "0"))


def test_probe_needs_some_context() -> None:
    with pytest.raises(InvalidRequestError, match="context of 32 tokens, zipserve needs 35"):
        probe(wrap(tiny("llama", max_position_embeddings=32), "short", "0"))
