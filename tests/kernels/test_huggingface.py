"""ZipCache: what transformers models read from it and what it keeps, over tiny random models of several families."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from prompts import LICENCE
from tiny_families import VOCABULARY, tiny
from zipserve.common import models
from zipserve.kernels.dequantize import dequantize_reference
from zipserve.kernels.huggingface import ZipCache, ZipLayer
from zipserve.kernels.zipformat import SINK_TOKENS, probe_counts, probe_offsets

BLOCK = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gpt_oss": {
        "sliding_window": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # its last two layers attend to the keys of the first two, and keep none
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}


@pytest.fixture
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """One thread: small tensors gain nothing from more, which only wait for each other where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def feed(module: Any, cache: Any, *pieces: torch.Tensor, **options: Any) -> torch.Tensor:
    """The logits of the last piece's last token, [batch, vocabulary]."""
    logits = torch.empty(0)
    for piece in pieces:
        logits = module(piece, past_key_values=cache, use_cache=True, **options).logits[:, -1]
    return logits


def bytes_of(cache: ZipCache) -> torch.Tensor:
    """Bytes of all sealed blocks, [layers, batch, blocks, layer_bytes]."""
    return torch.stack([layer.blocks for layer in cache.zip_layers])


def maps_of(layer: ZipLayer) -> torch.Tensor:
    """The class maps in the bytes: bool [batch, blocks, block_tokens]."""
    octets = layer.blocks[..., : layer.form.bitmap_bytes, None].int()
    return ((octets >> torch.arange(8)) & 1).flatten(-2).bool()


class Recorder(ZipCache):
    """Keeps what each layer was given, and what it returned at last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.zip_layers]
        self.returned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.given[layer_idx].append((key_states, value_states))
        self.returned[layer_idx] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.returned[layer_idx]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_before_a_block_is_complete_equals_plain(family: str) -> None:
    module = tiny(family, **FAMILIES[family])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = module.generate(ids(2, 30), **options)
    cache = ZipCache(module.config, block_tokens=BLOCK)
    assert module.generate(ids(2, 30), past_key_values=cache, **options).tolist() == expected.tolist()
    assert cache.get_seq_length() == 49
    assert module.generate(ids(2, 30), **options).tolist() == expected.tolist(), "other caches work under it too"


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 2.0},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ],
    ids=["sampling", "beams", "beam sampling", "prompt lookup"],
)
def test_ways_to_generate(llama: Any, options: dict[str, Any]) -> None:
    prompt = ids(1, 5).repeat(1, 6)
    options = {**options, "max_new_tokens": 20, "eos_token_id": None}
    torch.manual_seed(3)
    expected = llama.generate(prompt, past_key_values=DynamicCache(config=llama.config), **options)
    torch.manual_seed(3)
    found = llama.generate(prompt, past_key_values=ZipCache(llama.config, block_tokens=BLOCK), **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("profile", ["4/32", "43/32", "4/4"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_models_read_what_is_sealed(family: str, profile: str) -> None:
    module = tiny(family, **FAMILIES[family])
    cache = Recorder(module.config, profile, BLOCK)
    feed(module, cache, ids(2, 150), ids(2, 7, seed=2), ids(2, 1, seed=3))
    for index, layer in enumerate(cache.zip_layers):
        assert layer.blocks.shape == (2, 2, layer.form.layer_bytes)
        for row in range(2):
            slabs, sink_slabs = torch.arange(2), torch.tensor([0, -1])
            decoded = dequantize_reference(layer.blocks[row], slabs, layer.form, layer.sinks[row : row + 1], sink_slabs)
            for part in range(2):  # keys, values
                given = torch.cat([pieces[part] for pieces in cache.given[index]], 2)[row]
                found = cache.returned[index][part][row]
                sealed = decoded[part].transpose(0, 1).flatten(1, 2)
                # Rounding; one code beside another would be a thousand times that.
                torch.testing.assert_close(found[:, : 2 * BLOCK], sealed, rtol=0, atol=1e-5)
                assert torch.equal(found[:, 2 * BLOCK :], given[:, 2 * BLOCK :])
                torch.testing.assert_close(found[:, :SINK_TOKENS], given[:, :SINK_TOKENS], rtol=2e-3, atol=2e-3)
                error = (found - given)[:, SINK_TOKENS : 2 * BLOCK].norm() / given[:, SINK_TOKENS : 2 * BLOCK].norm()
                assert 0.01 < error < 0.4


def test_kept_copies_are_the_same(llama: Any) -> None:
    logits, maps = [], []
    for keep_decoded in (False, True):
        cache: Any = ZipCache(llama.config, block_tokens=BLOCK, keep_decoded=keep_decoded)
        logits.append(feed(llama, cache, ids(2, 70), ids(2, 60, seed=2), ids(2, 1, seed=3), ids(2, 2, seed=4)))
        cache.reorder_cache(torch.tensor([1, 0]))
        logits[-1] = torch.cat((logits[-1], feed(llama, cache, ids(2, 3, seed=5))))
        maps.append(bytes_of(cache))
    assert torch.equal(*maps)
    assert torch.equal(*logits)


def scores_of(attentions: list[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """Normalized scores from one layer's whole attention, [batch, blocks, BLOCK]; infinite for sinks.

    Args:
        attentions: of each call [batch, heads, its tokens, all tokens until then].
        real: bool [batch, tokens], false for padding.
    """
    tokens = real.shape[1]
    rows = [torch.nn.functional.pad(part.mean(1), (0, tokens - part.shape[-1])) for part in attentions]
    weights = torch.cat(rows, 1).masked_fill(~real[..., None], 0.0)
    blocks = []
    for start in range(0, tokens - BLOCK + 1, BLOCK):
        probes = torch.tensor(probe_offsets(BLOCK)) + start
        scores = weights[:, probes, start : start + BLOCK].sum(1)
        blocks.append(scores / torch.tensor(probe_counts(BLOCK)))
    blocks[0][:, :SINK_TOKENS] = torch.inf
    return torch.stack(blocks, 1)


@pytest.mark.parametrize(("sizes", "padding"), [([100, 2, 5, 22, 1], 0), ([128, 1], 37), ([130, 1], 70)])
@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_those_of_full_attention(family: str, sizes: list[int], padding: int) -> None:
    """Whatever the family does: windows, softcap, sinks, shared keys; with padding on the left of the first row."""
    module = tiny(family, **FAMILIES[family])
    real = torch.ones(2, sum(sizes), dtype=torch.bool)
    real[0, :padding] = False
    found: list[list[torch.Tensor]] = []
    attentions: list[list[torch.Tensor]] = []
    for implementation in (module.config._attn_implementation, "eager"):  # eager for the weights
        module.set_attn_implementation(implementation)
        cache = ZipCache(module.config, block_tokens=BLOCK)
        length, attentions = 0, []
        for piece in torch.split(ids(2, sum(sizes)), sizes, 1):
            length += piece.shape[1]
            output = module(
                piece,
                attention_mask=real[:, :length].long(),
                past_key_values=cache,
                output_attentions=implementation == "eager",
            )
            attentions.append(output.attentions)
            assert output.logits[1].isfinite().all()
        found.append([maps_of(layer) for layer in cache.zip_layers])
    for index, maps in enumerate(zip(*found, strict=True)):
        scores = scores_of([of_layers[index] for of_layers in attentions], real)
        assert scores[..., SINK_TOKENS:].std() > 1e-3, "or any order would do"
        for hi in maps:
            assert hi.shape == (2, 2, BLOCK)
            assert (hi.sum(-1) == BLOCK // 2).all()
            # No token of the lo class has a higher score than one of the hi class.
            worst = scores.masked_fill(~hi, torch.inf).amin(-1)
            best = scores.masked_fill(hi, 0.0).amax(-1)
            assert (worst >= best - 1e-6).all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("sizes", [[1] * BLOCK, [10, 53, 1], [63, 1]], ids=["tokens", "pieces", "last alone"])
def test_steps_seal_what_one_prompt_seals(family: str, sizes: list[int]) -> None:
    module = tiny(family, **FAMILIES[family])
    whole, stepwise = (ZipCache(module.config, block_tokens=BLOCK) for _ in range(2))
    prompt = ids(2, BLOCK)
    feed(module, whole, prompt, ids(2, 1, seed=2))
    feed(module, stepwise, *torch.split(prompt, sizes, 1), ids(2, 1, seed=2))
    for one, other in zip(whole.zip_layers, stepwise.zip_layers, strict=True):
        assert torch.equal(maps_of(one), maps_of(other))
    assert (bytes_of(whole) == bytes_of(stepwise)).float().mean() >= 0.999


def test_size_counts_everything(llama: Any) -> None:
    cache = ZipCache(llama.config, block_tokens=BLOCK)
    assert cache.nbytes == 0
    feed(llama, cache, ids(2, 150))
    per_token = 2 * 2 * 16  # keys and values of 2 heads
    assert cache.bits_per_value() == 32
    feed(llama, cache, ids(2, 1))
    # of 64 tokens 32 bits for minimum and width of a key channel, 8 for a value row's exponent, 1 for the class
    block = BLOCK * per_token * ((4 + 32 / BLOCK) / 2 + (2.5 + 8 / 16) / 2 + 1 / per_token) / 8
    layer = 2 * block + SINK_TOKENS * per_token * 2 + 23 * per_token * 4
    assert cache.nbytes == 4 * 2 * layer
    assert cache.bits_per_value() == pytest.approx(8 * layer / (151 * per_token))


def test_rows_move_with_their_beams(llama: Any) -> None:
    prompt, step = ids(3, 70), ids(3, 1, seed=2)
    moves: list[tuple[str, Any, list[int]]] = [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([2, 1]), [2, 1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
    ]
    for move, argument, rows in moves:
        cache, still = (ZipCache(llama.config, block_tokens=BLOCK) for _ in range(2))
        pieces = [ids(3, 50, seed=3), ids(3, 15, seed=4), ids(3, 1, seed=5)]  # a block ends on the way
        feed(llama, cache, prompt, step)
        getattr(cache, move)(argument)
        found = feed(llama, cache, *(piece[rows] for piece in pieces))
        expected = feed(llama, still, prompt, step, *pieces)
        torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-4)
        assert (bytes_of(cache) == bytes_of(still)[:, rows]).float().mean() >= 0.999
    empty: Any = ZipCache(llama.config)
    empty.reorder_cache(torch.tensor([0]))  # nothing to do


def test_half_precision() -> None:
    module = tiny("llama").to(torch.bfloat16)
    cache = Recorder(module.config, block_tokens=BLOCK)
    assert feed(module, cache, ids(2, 70), ids(2, 1)).isfinite().all()
    assert {part.dtype for parts in cache.returned.values() for part in parts} == {torch.bfloat16}
    assert cache.bits_per_value() < 16


@pytest.mark.parametrize("junk", [9, 45])
def test_crop_leaves_no_trace(llama: Any, junk: int) -> None:
    """Even of tokens that were probe rows, and that completed a block."""
    cache, other = (ZipCache(llama.config, block_tokens=BLOCK) for _ in range(2))
    feed(llama, cache, ids(2, 100), ids(2, junk, seed=2))
    cache.crop(-junk)
    assert cache.get_seq_length() == 100
    feed(llama, other, ids(2, 100))
    rest = [ids(2, 5, seed=3), ids(2, 30, seed=4), ids(2, 1, seed=5)]
    assert torch.equal(feed(llama, cache, *rest), feed(llama, other, *rest))
    assert torch.equal(bytes_of(cache), bytes_of(other))


def test_crop_does_not_cut_what_is_sealed(llama: Any) -> None:
    cache = ZipCache(llama.config, block_tokens=BLOCK)
    cache.crop(-1)  # of nothing
    feed(llama, cache, ids(1, 70), ids(1, 1))
    with pytest.raises(ValueError, match="layer 0: 8 tokens cannot be removed, only the last 7 of 71 are not sealed"):
        cache.crop(-8)
    with pytest.raises(ValueError, match="negative number, not 3"):
        cache.crop(3)
    cache.crop(0)
    cache.crop(-7)
    assert cache.get_seq_length() == BLOCK
    assert feed(llama, cache, ids(1, 1)).isfinite().all()


def test_reset(llama: Any) -> None:
    cache: Any = ZipCache(llama.config, block_tokens=BLOCK, keep_decoded=True)
    first = feed(llama, cache, ids(1, 70), ids(1, 1))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert torch.equal(feed(llama, cache, ids(1, 70), ids(1, 1)), first)


def test_config_of_several_parts_is_switched_in_its_decoder() -> None:
    config: Any = AutoConfig.for_model("gemma3")
    config._attn_implementation = "sdpa"
    ZipCache(config)
    assert config.text_config._attn_implementation == "zip_sdpa"
    assert config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "5/5"}, "profile '5/5' is unknown"),
        ({"block_tokens": 100}, "block_tokens that is a multiple of 64, not 100"),
    ],
)
def test_formats_that_do_not_exist(llama: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZipCache(llama.config, **arguments)


@pytest.mark.parametrize(
    ("family", "message"),
    [("t5", "not for encoder-decoder"), ("jamba", "not for linear_attention"), ("falcon_h1", "not for hybrid")],
)
def test_models_that_keep_something_else(family: str, message: str) -> None:
    config: Any = AutoConfig.for_model(family)
    config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=message):
        ZipCache(config)


@pytest.mark.parametrize("implementation", [None, "flex_attention", "flash_attention_2"])
def test_attention_that_does_not_show_its_queries(llama: Any, implementation: str | None) -> None:
    llama.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=r"under the attention implementations sdpa and eager, not under .*4/4"):
        ZipCache(llama.config)
    ZipCache(llama.config, profile="4/3")
    assert llama.config._attn_implementation == implementation


def test_attention_that_was_switched_back(llama: Any) -> None:
    cache = ZipCache(llama.config, block_tokens=BLOCK)
    feed(llama, cache, ids(1, 3))
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"layer 0: tokens 3 to 3 have no saliency.*ZipCache\(model.config\)"):
        feed(llama, cache, ids(1, 1))
    one_class = ZipCache(llama.config, "4/4", BLOCK)
    assert feed(llama, one_class, ids(1, 70), ids(1, 1)).isfinite().all()
    assert bytes_of(one_class).shape[2] == 1


@pytest.mark.parametrize(
    ("family", "settings"),
    [("falcon", {}), ("gptj", {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 16})],
)
def test_families_with_an_attention_of_their_own(family: str, settings: dict[str, Any]) -> None:
    """Noticed in the first call: falcon would compute something else under a name that it does not know."""
    module = tiny(family, head_dim=None, **settings)
    cache = ZipCache(module.config, block_tokens=BLOCK)
    with pytest.raises(RuntimeError, match="layer 0: tokens 0 to 4 have no saliency"):
        feed(module, cache, ids(1, 5))


def test_heads_that_the_format_does_not_know() -> None:
    module = tiny("llama", head_dim=24)
    with pytest.raises(ValueError, match="key_dim that is a multiple of 16, not 24"):
        feed(module, ZipCache(module.config), ids(1, 5))


@pytest.mark.parametrize(("factor", "reason"), [(torch.nan, "are not finite"), (1e7, "are larger than the zip format")])
def test_keys_that_the_format_cannot_hold(llama: Any, factor: float, reason: str) -> None:
    with torch.no_grad():
        llama.model.layers[1].self_attn.v_proj.weight.mul_(factor)
    cache = ZipCache(llama.config, block_tokens=BLOCK)
    feed(llama, cache, ids(1, 70))
    with pytest.raises(ValueError, match=rf"layer 1, row 0: keys or values of tokens 0 to 63 {reason}"):
        feed(llama, cache, ids(1, 1))


def test_quality_on_a_real_model() -> None:
    """A block of the licence, and half of one, are the context of what follows: near to exact, but not exact."""
    folder = models.resolve(models.DEFAULT_MODEL).folder
    families: Any = AutoModelForCausalLM
    module = families.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)(LICENCE.read_text()).input_ids[:256]])
    logits = []
    for cache in (DynamicCache(config=module.config), ZipCache(module.config)):
        module(tokens[:, :192], past_key_values=cache, logits_to_keep=1)
        logits.append(module(tokens[:, 192:], past_key_values=cache).logits[0].log_softmax(-1))
    exact, zipped = logits
    assert 1e-5 < (exact.exp() * (exact - zipped)).sum(-1).mean() < 0.015
