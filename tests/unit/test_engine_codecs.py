"""Every codec in the engine: what is read back, how steps and hand-overs agree, and what is refused."""

from typing import Any

import pytest
import torch

from tiny_families import tiny
from zipserve.common.errors import KvValueError
from zipserve.common.kv.layout import CODECS, SlabKind
from zipserve.engine.attention import Scoring, Visibility
from zipserve.engine.batch import Batch
from zipserve.engine.cache import KvCache
from zipserve.engine.codec import codec_for
from zipserve.engine.engine import Engine
from zipserve.engine.loader import LoadedModel, wrap
from zipserve.engine.sequence import Segment, Sequence
from zipserve.kernels.quantize import NON_FINITE
from zipserve.kernels.saliency import probe_scores_reference
from zipserve.kernels.zipformat import PROFILES, probe_offsets

BLOCK = 64
LOSSY = [codec for codec in CODECS if codec != "raw"]
ZIPS = [f"zip-{profile}" for profile in PROFILES]
ERROR_MAX = {"raw": 0.0, "int8": 0.01, "int4": 0.12, "zipcache": 0.5, "zip-4/4": 0.12, "zip-4/3": 0.2, "zip-4/32": 0.4,
             "zip-43/32": 0.4, "zip-4/2": 0.4, "zip-3/2": 0.4}  # fmt: skip
"""Relative error of keys and values of the model below, at most."""


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return wrap(tiny("llama", num_hidden_layers=2, max_position_embeddings=512), "tiny", "0")


def engine_of(model: LoadedModel, codec: str, blocks: int = 8, slots: int = 3) -> Engine:
    return Engine(model, KvCache(model.layout(codec=codec, block_tokens=BLOCK), blocks, 3, slots, 3))


def ids(count: int, seed: int = 1) -> list[int]:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def step(engine: Engine, sequence: Sequence, token_ids: list[int]) -> torch.Tensor:
    computed = engine.forward([Segment(sequence, token_ids)])
    assert computed.failed == {}
    return computed.logits[0]


def read(engine: Engine, layer: int, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    count = sequence.length // BLOCK
    slabs = torch.tensor(sequence.blocks[:count])
    return engine.cache.codec.read_blocks(layer, slabs, torch.tensor(sequence.sink_slabs(0, count)))


def block_bytes(engine: Engine, layer: int, slab: int) -> torch.Tensor:
    """The payload of one layer of a block."""
    layout = engine.cache.layout
    size = layout.payload_bytes(SlabKind.BLOCK, BLOCK) // layout.layers
    return engine.cache.arenas.blocks[slab, 128 + layer * size : 128 + (layer + 1) * size]


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_read_is_close_to_what_was_written(model: LoadedModel, codec: str) -> None:
    exact, coded = engine_of(model, "raw"), engine_of(model, codec)
    coded.cache.arenas.blocks.fill_(0xAB)
    coded.cache.arenas.sinks.fill_(0xAB)
    prompt = ids(200)
    sequences = [Sequence([4, 1, 6], 2, sinks=1), Sequence([0, 7, 2], 1, sinks=2)]
    logits = [step(engine, sequence, prompt) for engine, sequence in zip((exact, coded), sequences, strict=True)]
    torch.testing.assert_close(*logits)  # the prompt itself is computed exactly
    for layer in range(model.layers):
        for found, wanted in zip(read(coded, layer, sequences[1]), read(exact, layer, sequences[0]), strict=True):
            assert (found - wanted).norm() <= ERROR_MAX[codec] * wanted.norm()
            assert found.dtype == torch.float32
    assert (coded.cache.arenas.blocks[:, :128] == 0xAB).all(), "headers belong to the worker"
    assert (coded.cache.arenas.blocks[[1, 3, 4, 5, 6]] == 0xAB).all(), "a slab of somebody else"


@pytest.mark.parametrize("codec", CODECS)
def test_decode_rows_equal_a_chunk_over_the_same_blocks(model: LoadedModel, codec: str) -> None:
    """Decode attends over the codes, a chunk over what they decode to: the same logits."""
    engine = engine_of(model, codec)
    prompt, more = ids(150), ids(5, seed=2)
    one, other = Sequence([0, 1], 0, sinks=0), Sequence([2, 3], 1, sinks=1)
    step(engine, one, prompt)
    step(engine, other, prompt)
    by_rows = torch.stack([step(engine, one, [token]) for token in more])
    by_chunk = engine.logits_of(Segment(other, more))
    torch.testing.assert_close(by_rows, by_chunk, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129])
def test_hand_over_at_every_kind_of_length(model: LoadedModel, codec: str, length: int) -> None:
    """Blocks, sinks and tail copied to another cache: it decodes as if the sequence had stayed.

    A tail in 8 bits is almost the same, as long as it is a tail: the block that it becomes has other cells.
    """
    prefill, decode = engine_of(model, codec), engine_of(model, codec)
    here, there = Sequence([3, 1, 5], 1, sinks=2), Sequence([0, 6, 2], 0, length, sinks=1)
    step(prefill, here, ids(length))
    for kind, source, target in [
        (SlabKind.SINKS, 2, 1),
        *((SlabKind.BLOCK, *pair) for pair in zip(here.blocks, there.blocks, strict=True)),
    ]:
        if prefill.cache.layout.slab_bytes(kind):
            decode.cache.slab(kind, target)[:] = prefill.cache.slab(kind, source)
    if length % BLOCK:
        prefill.cache.pack_tail(here.slot, length % BLOCK, 0)
        decode.cache.slab(SlabKind.TAIL, 2)[:] = prefill.cache.slab(SlabKind.TAIL, 0)
        decode.cache.unpack_tail(2, length % BLOCK, there.slot)
    exact = codec == "raw" or length % BLOCK == 0
    tolerance, steps = (1e-5, 70) if exact else (0.05, BLOCK - length % BLOCK)
    for token in ids(steps, seed=3):
        found, wanted = step(decode, there, [token]), step(prefill, here, [token])
        assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_a_tail_is_coded_in_8_bits_with_its_scores(model: LoadedModel) -> None:
    engine = engine_of(model, "zip-4/32")
    sequence = Sequence([], 1)
    step(engine, sequence, ids(40))
    cache = engine.cache
    keys, scores = cache.open_keys[:, 1].clone(), cache.open_scores[:, 1].clone()
    assert (scores[:, :40].sum(1) > 0).all()
    cache.pack_tail(1, 40, 2)
    cache.open_keys.fill_(torch.nan)
    cache.open_scores.fill_(torch.nan)
    cache.unpack_tail(2, 40, 0)
    assert (cache.open_keys[:, 0] - keys).norm() < 0.01 * keys.norm()
    assert torch.equal(cache.open_scores[:, 0], scores)


def full_attention_scores(model: LoadedModel, prompt: list[int]) -> dict[int, torch.Tensor]:
    """Probe scores of the prompt's blocks by layer, from the whole attention matrix of transformers."""
    model.module.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model.module(torch.tensor([prompt]), output_attentions=True).attentions
    model.module.set_attn_implementation("zipserve")
    found = {}
    for layer, weights in enumerate(attentions):
        mean = weights[0].mean(0)
        found[layer] = torch.stack(
            [
                sum(mean[start + offset, start : start + BLOCK] for offset in probe_offsets(BLOCK))
                for start in range(0, len(prompt) // BLOCK * BLOCK, BLOCK)
            ]
        )
    return found


@pytest.mark.parametrize("chunks", [(130,), (50, 80), (1, 128, 1), (63, 1, 1, 65), (1,) * 130])
def test_scores_are_those_of_the_full_attention(model: LoadedModel, chunks: tuple[int, ...]) -> None:
    """However a prompt is cut into chunks and single tokens: in decode as in prefill."""
    prompt = ids(130)
    wanted = full_attention_scores(model, prompt)
    engine = engine_of(model, "raw")
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(model.layers)}
    codec: Any = engine.cache.codec
    codec.needs_scores = True
    write = codec.write_blocks

    def spy(layer: int, *arguments: Any) -> Any:
        seen[layer].append(arguments[4].clone())
        return write(layer, *arguments)

    codec.write_blocks = spy
    sequence, start = Sequence([0, 1], 0), 0
    for size in chunks:
        step(engine, sequence, prompt[start : start + size])
        start += size
    for layer, scores in wanted.items():
        torch.testing.assert_close(torch.cat(seen[layer]), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codec", ["zip-4/32", "zip-43/32", "zip-4/4"])
def test_a_block_sealed_in_decode_has_the_bytes_of_prefill(model: LoadedModel, codec: str) -> None:
    """Up to rounding: the same classes, and all but a few codes, which lie at a border of two cells."""
    engine = engine_of(model, codec)
    prompt = ids(BLOCK)
    at_once, by_tokens = Sequence([0], 0, sinks=0), Sequence([1], 1, sinks=1)
    step(engine, at_once, prompt)
    step(engine, by_tokens, prompt[:20])
    for token in prompt[20:]:
        step(engine, by_tokens, [token])
    bitmap = engine.cache.layout.zip_format.bitmap_bytes  # type: ignore[union-attr]
    for layer in range(model.layers):
        one, other = (block_bytes(engine, layer, slab) for slab in (0, 1))
        assert torch.equal(one[:bitmap], other[:bitmap])
        assert (one != other).float().mean() < 0.005


@pytest.mark.parametrize("codec", LOSSY)
def test_bytes_can_be_made_again(model: LoadedModel, codec: str) -> None:
    engine = engine_of(model, codec)
    for slab, batch in ((0, 1), (1, 2)):
        others = [Segment(Sequence([7], 2, sinks=2), ids(70, seed=9))][: batch - 1]
        engine.forward([*others, Segment(Sequence([slab], 0, sinks=0), ids(BLOCK))])
    for layer in range(model.layers):
        # another batch may round the model's products differently; nothing else may differ
        assert (block_bytes(engine, layer, 0) != block_bytes(engine, layer, 1)).float().mean() < 0.005


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_fail_their_sequence_only(
    model: LoadedModel, codec: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, codec)
    expected = step(engine, Sequence([0], 0, sinks=0), ids(70))
    attend = Batch.attend

    def poisoned(
        self: Batch, layer: int, query: torch.Tensor, key: torch.Tensor, v: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        if layer == 1:
            v = v.clone()
            v[1, 5, 3] = value  # token 5 of the first segment
        return attend(self, layer, query, key, v, scoring)

    monkeypatch.setattr(Batch, "attend", poisoned)
    bad, good = Sequence([1], 1, sinks=1), Sequence([2], 2, sinks=2)
    computed = engine.forward([Segment(bad, ids(66, seed=4)), Segment(good, ids(70))])
    assert list(computed.failed) == [0]
    assert isinstance(computed.failed[0], KvValueError)
    assert "layer 1" in computed.failed[0].message
    assert "not finite" in computed.failed[0].message
    assert (bad.length, good.length) == (0, 70)
    torch.testing.assert_close(computed.logits[1], expected)


@pytest.mark.parametrize("codec", CODECS)
def test_a_tail_that_is_not_finite_is_refused(model: LoadedModel, codec: str) -> None:
    cache = engine_of(model, codec).cache
    cache.open_values[1, 0, 0, 3, 2] = torch.inf
    cache.pack_tail(0, 3, 0)  # token 3 is not among them
    with pytest.raises(KvValueError, match="tail of layer 1 cannot be sealed: K or V is not finite"):
        cache.pack_tail(0, 4, 0)


@pytest.mark.parametrize("codec", CODECS)
def test_one_refused_block_of_several(model: LoadedModel, codec: str) -> None:
    layout = model.layout(codec=codec, block_tokens=BLOCK)
    cache = KvCache(layout, 4, 1, 1, 2)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, BLOCK, 16, generator=generator) for _ in range(2))
    keys[1, 1, 9, 4] = torch.nan
    scores = torch.rand(3, BLOCK, generator=generator)
    slabs, sinks = torch.tensor([2, 0, 3]), torch.tensor([-1, -1, 1])
    status = codec_for(layout, cache.arenas).write_blocks(0, slabs, sinks, keys, values, scores)
    assert status is not None
    assert status.tolist() == [0, NON_FINITE, 0]


def test_a_block_needs_a_slab_for_its_sinks(model: LoadedModel) -> None:
    engine = engine_of(model, "zip-4/4")
    with pytest.raises(ValueError, match="fills block 0 and has sinks slab -1 of 3"):
        engine.forward([Segment(Sequence([0], 0), ids(BLOCK))])
    step(engine, Sequence([], 0), ids(BLOCK - 1))


def test_windows_and_softcap_reach_the_scores() -> None:
    """Of probe rows under a window: as if the keys before it did not exist."""
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(4, 3, 16, generator=generator), torch.randn(2, 90, 16, generator=generator)
    rows, seen = [70, 80, 89], Visibility(window=12)
    own, first = torch.tensor(rows), torch.tensor([seen.first(row) for row in rows])
    block, start = torch.zeros(3, dtype=torch.int64), torch.tensor([64])
    found = probe_scores_reference(query, keys, own, first, block, start, BLOCK, 0.25, 5.0, None)[0]
    wanted = torch.zeros(BLOCK)
    for row, (at, low) in enumerate(zip(rows, first.tolist(), strict=True)):
        products = torch.einsum("hd,hkd->hk", query[:, row], keys[:, low : at + 1].repeat_interleave(2, 0)) * 0.25
        weights = (torch.tanh(products / 5.0) * 5.0).softmax(1).mean(0)
        for key, weight in zip(range(low, at + 1), weights, strict=True):
            if key >= 64:
                wanted[key - 64] += weight
    torch.testing.assert_close(found, wanted)
