"""Greedy tokens through the engine equal Hugging Face `generate`, for unmodified modules of many families.

Weights are random and enlarged, so that attention decides the tokens; prompts arrive in chunks beside sequences that
decode, as in a server.
"""

from typing import Any, Literal

import pytest
import torch

from tiny_families import tiny
from zipserve.common.errors import InvalidRequestError
from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.fused import NotRecognizedError, recognize
from zipserve.engine.loader import LoadedModel, wrap
from zipserve.engine.probe import probe, take_references
from zipserve.engine.sequence import Segment, Sequence
from zipserve.engine.startup import PATHS, Path

NEW_TOKENS = 12
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "head_dim": 8,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2, softcap and windows": (
        "gemma2",
        {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3, windows": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {}),
    "phi3, rotary embedding of half a head": ("phi3", {"partial_rotary_factor": 0.5}),
    "smollm3, a layer without rotary embedding": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
    "gpt2, learned positions": ("gpt2", GPT2),
    "opt, learned positions": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "gpt_bigcode, one KV head": ("gpt_bigcode", GPT2),
    "gpt_oss, sinks and windows": ("gpt_oss", {**EXPERTS, "sliding_window": 6}),
    "llama4, chunks": ("llama4_text", {**EXPERTS, "attention_chunk_size": 6, "intermediate_size_mlp": 96}),
    "deepseek_v3, values narrower than keys": ("deepseek_v3", {**EXPERTS, **LATENT}),
}
FUSED = {family for family in FAMILIES if family.startswith(("llama", "mistral", "qwen", "gemma", "phi3", "smollm3"))}
FUSED.discard("llama4, chunks")
"""What has a fused plan."""


def prepare(module: Any, path: Path | Literal["module"]) -> LoadedModel | None:
    """A model on a path; None where the path does not know the family."""
    model = wrap(module, "tiny", "0")
    if path == "module":
        return model
    try:
        return PATHS[path](model, torch.float32)
    except NotRecognizedError:
        return None


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def generate(module: Any, prompt: list[int]) -> list[int]:
    """What plain transformers answers."""
    module.set_attn_implementation("eager")
    output = module.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


def serve(model: LoadedModel, prompts: list[list[int]], block_tokens: int, chunks: list[int]) -> list[list[int]]:
    """What the engine answers when sequence i joins at step i, and prompts come in chunks of these lengths, in turn."""
    layout = model.layout(block_tokens=block_tokens)
    per_sequence = layout.blocks_for(max(map(len, prompts)) + NEW_TOKENS)
    engine = Engine(model, KvCache(layout, per_sequence * len(prompts), 0, len(prompts)))
    # Slabs are dealt out like cards, so that no sequence has neighbouring ones.
    sequences = [
        Sequence(list(range(i, per_sequence * len(prompts), len(prompts))), slot=len(prompts) - 1 - i)
        for i in range(len(prompts))
    ]
    waiting = [list(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    step = 0
    while any(len(answer) < NEW_TOKENS for answer in answers):
        running = [i for i in range(min(step + 1, len(prompts))) if len(answers[i]) < NEW_TOKENS]
        segments = []
        for i in running:
            size = chunks[(step + i) % len(chunks)]
            segments.append(Segment(sequences[i], waiting[i][:size]))
            waiting[i] = waiting[i][size:]
        for i, token in zip(running, engine.forward(segments).logits.argmax(-1).tolist(), strict=True):
            if not waiting[i]:
                answers[i].append(token)
                waiting[i] = [token]
        step += 1
    return answers


@pytest.mark.parametrize("path", ["module", "packed", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate(family: str, path: Path | Literal["module"]) -> None:
    name, settings = FAMILIES[family]
    module = tiny(name, **settings)
    prompts = random_prompts(21, 1, 16, 37, 5)
    expected = [generate(module, prompt) for prompt in prompts]
    model = prepare(module, path)
    if model is None:
        assert family not in FUSED
    else:
        assert serve(model, prompts, block_tokens=8, chunks=[7, 1, 30, 8]) == expected


def test_a_plan_that_is_wrong_at_late_positions_only_is_noticed() -> None:
    """Ministral 3 scales its queries behind the context of its first training, which the fused plan does not know."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "llama_4_scaling_beta": 0.1}
    settings = {"rope_parameters": rope | {"original_max_position_embeddings": 128}}
    model = wrap(tiny("ministral3", **settings), "tiny", "0")
    references = take_references(model)
    with pytest.raises(InvalidRequestError, match=r"at token 2\d\d of sequence 0"):
        probe(PATHS["fused"](model, torch.float32), references)
    probe(PATHS["packed"](wrap(tiny("ministral3", **settings), "tiny", "0"), torch.float32), references)


def test_layers_of_other_widths_or_other_heads_have_no_plan() -> None:
    """The plan's buffers are as wide as one layer's; a wider one would write beyond them."""
    module = tiny("llama")
    module.model.layers[1].mlp = tiny("llama", intermediate_size=128).model.layers[1].mlp
    assert prepare(module, "fused") is None
    module = tiny("llama")
    module.output, module.lm_head = module.lm_head, None
    with pytest.raises(NotRecognizedError, match="NoneType"):
        recognize(module, (4, 2, 16, 16))


@pytest.mark.parametrize("family", ["llama", "mistral, window"])
def test_equals_generate_with_blocks_of_128(family: str) -> None:
    name, settings = FAMILIES[family]
    module = tiny(name, **settings)
    prompts = random_prompts(127, 128, 129, 120, 3)
    expected = [generate(module, prompt) for prompt in prompts]
    assert serve(wrap(module, "tiny", "0"), prompts, block_tokens=128, chunks=[200]) == expected


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {"sliding_window": 21}),
        ("gpt_oss", {**EXPERTS, "sliding_window": 21}),
        ("llama4_text", {**EXPERTS, "attention_chunk_size": 21, "intermediate_size_mlp": 96}),
    ],
)
def test_windows_of_long_prompts(
    name: str, settings: dict[str, Any], with_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts longer than a tile of queries, with windows that begin inside of one and inside of a block."""
    if not with_kernel:
        monkeypatch.setattr("zipserve.kernels.prefill_attention.runs_on_cpu", lambda *_: False)
        monkeypatch.setattr("zipserve.kernels.prefill_attention.dense.TILE_TOKENS", 16)
    module = tiny(name, **settings)
    prompts = random_prompts(90, 50)
    expected = [generate(module, prompt) for prompt in prompts]
    assert serve(wrap(module, "tiny", "0"), prompts, block_tokens=8, chunks=[61, 200]) == expected
