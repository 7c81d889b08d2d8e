"""Steps over a KV cache: what is written where, what a sequence may depend on, what is refused."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest
import torch

from tiny_families import tiny
from zipserve.common.errors import InternalError
from zipserve.common.kv.layout import HEADER_BYTES, SLAB_ALIGNMENT_BYTES, SlabKind
from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.loader import LoadedModel, wrap
from zipserve.engine.sequence import Segment, Sequence

BLOCK = 8
NO_SINKS = torch.tensor([-1, -1, -1])


@pytest.fixture
def model() -> LoadedModel:
    return wrap(tiny("llama", num_hidden_layers=3, max_position_embeddings=64), "tiny", "0")


def engine_of(model: LoadedModel, blocks: int = 16, slots: int = 4) -> Engine:
    return Engine(model, KvCache(model.layout(block_tokens=BLOCK), blocks, 4, slots))


def ids(count: int, seed: int = 1) -> list[int]:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def step(engine: Engine, sequence: Sequence, token_ids: SequenceOf[int]) -> torch.Tensor:
    return logits_of(engine, [Segment(sequence, token_ids)])[0]


def logits_of(engine: Engine, segments: SequenceOf[Segment]) -> torch.Tensor:
    computed = engine.forward(segments)
    assert computed.failed == {}
    return computed.logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(29,), (7, 22), (8, 21), (1, 28), (9, 15, 5), (28, 1), (16, 8, 5), (1,) * 29])
def test_chunks_equal_one_prompt(model: LoadedModel, sizes: tuple[int, ...]) -> None:
    prompt = ids(29)
    engine = engine_of(model)
    expected = step(engine, Sequence([0, 1, 2], 0), prompt)
    sequence, start = Sequence([7, 3, 5], 2), 0
    logits = torch.empty(0)
    for size in sizes:
        logits = step(engine, sequence, prompt[start : start + size])
        start += size
        assert sequence.length == start
    close(logits, expected)
    for layer in range(model.layers):
        for of_one, of_chunks in zip(
            engine.cache.codec.read_blocks(layer, torch.tensor([0, 1, 2]), NO_SINKS),
            engine.cache.codec.read_blocks(layer, torch.tensor([7, 3, 5]), NO_SINKS),
            strict=True,
        ):
            close(of_chunks, of_one)


def test_a_sequence_does_not_depend_on_others(model: LoadedModel) -> None:
    engine = engine_of(model)
    alone = step(engine, Sequence([0, 1], 0), ids(19))
    first, second, third = Sequence([2, 3], 1), Sequence([4], 2), Sequence([5, 6, 7], 3)
    engine.forward([Segment(second, ids(11, seed=2)), Segment(first, ids(19)[:18]), Segment(third, ids(20, seed=3))])
    together = logits_of(
        engine, [Segment(third, ids(3, seed=4)), Segment(first, ids(19)[18:]), Segment(second, ids(1, seed=5))]
    )
    close(together[1], alone)


def test_bytes_are_those_of_the_layout(model: LoadedModel) -> None:
    """Block and tail hold exactly the keys and values that transformers computes, where the layout says."""
    prompt = ids(21)
    engine = engine_of(model)
    engine.cache.arenas.blocks[:, :HEADER_BYTES] = 0xAB
    sequence = Sequence([5, 2], 3)
    step(engine, sequence, prompt)
    engine.cache.pack_tail(3, 5, 1)
    model.module.set_attn_implementation("eager")
    with torch.inference_mode():
        past = model.module(torch.tensor([prompt]), use_cache=True).past_key_values
    layout = engine.cache.layout
    parts = [(SlabKind.BLOCK, 5, 0, 8), (SlabKind.BLOCK, 2, 8, 8), (SlabKind.TAIL, 1, 16, 5)]
    for kind, slab, start, tokens in parts:
        size = 4 * tokens * (layout.key_dim + layout.value_dim)
        for layer in range(layout.layers):
            for head in range(layout.kv_heads):
                at = HEADER_BYTES + (layer * layout.kv_heads + head) * size
                segment = engine.cache.slab(kind, slab)[at : at + size]
                data = torch.from_numpy(np.frombuffer(segment, np.float32).copy())
                keys, values = data[: tokens * layout.key_dim], data[tokens * layout.key_dim :]
                theirs = past.layers[layer]
                close(keys.view(tokens, -1), theirs.keys[0, head, start : start + tokens])
                close(values.view(tokens, -1), theirs.values[0, head, start : start + tokens])
    assert (engine.cache.arenas.blocks[:, :HEADER_BYTES] == 0xAB).all(), "headers belong to the worker"


@pytest.mark.parametrize("length", [5, 8, 21, 24])
def test_handoff_to_another_cache(model: LoadedModel, length: int) -> None:
    """Prefill, copy blocks and tail to a cache with other slabs and slots, decode there: as if it had stayed."""
    prefill, decode = engine_of(model), engine_of(model, blocks=10, slots=2)
    for arena in (decode.cache.open_keys, decode.cache.open_values):
        arena.fill_(torch.nan)  # what another sequence may have left
    here, there = Sequence([1, 2, 3, 4], 1), Sequence([9, 0, 4, 3], 0, length)
    step(prefill, here, ids(length))
    for source, target in zip(here.blocks[: length // BLOCK], there.blocks, strict=False):
        decode.cache.slab(SlabKind.BLOCK, target)[:] = prefill.cache.slab(SlabKind.BLOCK, source)
    prefill.cache.pack_tail(here.slot, length % BLOCK, 3)
    decode.cache.slab(SlabKind.TAIL, 2)[:] = prefill.cache.slab(SlabKind.TAIL, 3)
    decode.cache.unpack_tail(2, length % BLOCK, there.slot)
    # Beside a row whose open block is longer, so that what is multiplied covers tokens that do not exist there yet.
    other = Sequence([5, 6], 1)
    step(decode, other, ids(7))
    for token in ids(10, seed=6):
        found = logits_of(decode, [Segment(other, [token]), Segment(there, [token])])[1]
        close(found, step(prefill, here, [token]))


def test_tail_has_no_gaps_and_a_limit(model: LoadedModel) -> None:
    cache = engine_of(model).cache
    size = cache.layout.payload_bytes(SlabKind.TAIL, 3)
    cache.arenas.tails[0] = 0xAB
    cache.pack_tail(0, 3, 0)
    assert (cache.arenas.tails[0, HEADER_BYTES : HEADER_BYTES + size] == 0).all()
    assert (cache.arenas.tails[0, HEADER_BYTES + size :] == 0xAB).all()
    assert (cache.arenas.tails[0, :HEADER_BYTES] == 0xAB).all()
    with pytest.raises(ValueError, match="0 to 7 tokens, not 8"):
        cache.pack_tail(0, 8, 0)


def test_shared_prefix(model: LoadedModel) -> None:
    """Two sequences read the same sealed blocks."""
    engine = engine_of(model)
    prompt = ids(20)
    step(engine, Sequence([0, 1], 0), prompt)
    expected = step(engine, Sequence([2, 3, 4], 1), prompt[:16] + ids(9, seed=7))
    close(step(engine, Sequence([0, 1, 5], 2, length=16), ids(9, seed=7)), expected)


@pytest.mark.parametrize("parts", [(1, 18), (1, 1, 17), (17, 1, 1), (8, 1, 10)])
def test_what_a_broken_sequence_left_harms_nobody(model: LoadedModel, parts: tuple[int, ...]) -> None:
    """Slots and slabs are reused without cleaning: NaN in them must not reach the next owner."""
    engine = engine_of(model)
    expected = step(engine, Sequence([0, 1, 2], 0), ids(19))
    cache = engine.cache
    for left in (cache.open_keys, cache.open_values, cache.arenas.blocks.view(torch.float32)):
        left.fill_(torch.nan)
    # Beside a row whose open block is longer, what is multiplied covers tokens that do not exist here yet.
    other = Sequence([7, 8], 3)
    step(engine, other, ids(4))
    sequence, start, logits = Sequence([3, 4], 1), 0, torch.empty(0)
    for size in parts:
        token_ids = ids(19)[start : start + size]
        logits = logits_of(engine, [Segment(other, [1]), Segment(sequence, token_ids)])[1]
        start += size
    close(logits, expected)


def test_refuses_what_does_not_fit(model: LoadedModel) -> None:
    engine = engine_of(model)
    long = Sequence(list(range(9)), 0)
    step(engine, long, ids(60))
    for segments, message in [
        ([], "at least one segment"),
        ([Segment(long, [])], "segment 0: has no tokens"),
        ([Segment(long, ids(5))], "ends at token 65, the model's context is 64"),
        ([Segment(Sequence([9], 1), ids(16))], "fills 2 blocks, its sequence has 1"),
        ([Segment(Sequence([], 4), [1])], "has slot 4 of 4"),
        ([Segment(Sequence([16], 1), ids(8))], "slabs outside of the 16"),
        ([Segment(Sequence([], 1), [1, 97])], "outside of the vocabulary of 97"),
        ([Segment(Sequence([], 1), [-1])], "outside of the vocabulary of 97"),
        ([Segment(long, [1]), Segment(long, [1])], "each of its own sequence"),
        ([Segment(long, [1]), Segment(Sequence([], 0), [1])], "share a slot"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.forward(segments)
    assert long.length == 60
    step(engine, Sequence([9], 1), ids(15))  # the last, partly filled block needs no slab


def test_logits_that_are_not_finite_fail_their_segment_only(model: LoadedModel) -> None:
    engine = engine_of(model)
    expected = step(engine, Sequence([], 2), [1, 2])
    with torch.no_grad():
        model.module.model.embed_tokens.weight[5] = torch.nan
    good, bad = Sequence([], 0), Sequence([], 1)
    computed = engine.forward([Segment(bad, [5]), Segment(good, [1, 2])])
    assert list(computed.failed) == [0]
    assert isinstance(computed.failed[0], InternalError)
    assert (good.length, bad.length) == (2, 0)
    close(computed.logits[1], expected)
    assert (computed.logits[0] == 0).all()


def test_a_module_that_lost_the_hook_is_noticed(model: LoadedModel) -> None:
    engine = engine_of(model)
    model.module.set_attn_implementation("eager")
    with pytest.raises(InternalError, match="0 layers attended through the engine, not 3"):
        step(engine, Sequence([], 0), [1])


def test_a_module_is_not_called_outside_of_the_engine(model: LoadedModel) -> None:
    with pytest.raises(RuntimeError, match="outside of the engine"):
        model.module(torch.tensor([[1]]))


def test_logits_of_a_module_that_computes_all_rows(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model)
    prompts = [Segment(Sequence([0, 1], 0), ids(9)), Segment(Sequence([], 1), [4])]
    expected = logits_of(engine, prompts)
    monkeypatch.setattr(type(model.module), "_supports_logits_to_keep", lambda _: False)
    found = logits_of(engine, [Segment(Sequence([2, 3], 2), ids(9)), Segment(Sequence([], 3), [4])])
    close(found, expected)


def test_engine_wants_a_cache_of_its_model(model: LoadedModel) -> None:
    other = KvCache(wrap(model.module, "other", "0").layout(block_tokens=BLOCK), 1, 1, 1)
    with pytest.raises(ValueError, match="laid out for other@0"):
        Engine(model, other)


def test_arenas_are_pages(model: LoadedModel) -> None:
    cache = engine_of(model).cache
    for kind in cache.layout.kinds():
        arena, slab_bytes = cache.arenas.of(kind), cache.layout.slab_bytes(kind)
        assert arena.is_contiguous()
        assert arena.shape[1] == slab_bytes
        assert arena.data_ptr() % SLAB_ALIGNMENT_BYTES == 0
    cache.slab(SlabKind.TAIL, 2)[:3] = b"abc"
    assert cache.arenas.tails[2, :3].tolist() == list(b"abc")
    assert cache.slab(SlabKind.BLOCK, 1).nbytes == cache.layout.slab_bytes(SlabKind.BLOCK)


def test_every_row_of_the_segments_that_want_them(model: LoadedModel) -> None:
    """Beside others, decode steps among them; the row of the last token is the step's."""
    engine = engine_of(model)
    alone = engine.logits_of(Segment(Sequence([0, 1], 0), ids(19)))
    wanted, started = Sequence([2, 3], 1), Sequence([4], 2)
    engine.forward([Segment(started, ids(5, seed=2))])
    computed = engine.forward(
        [Segment(Sequence([5], 3), ids(9, seed=3)), Segment(started, [1], True), Segment(wanted, ids(19), True)]
    )
    assert list(computed.every) == [1, 2]
    assert computed.every[1].shape == (1, model.vocab_tokens)
    close(computed.every[2], alone)
    close(computed.every[2][-1], computed.logits[2])
    close(computed.every[1][0], computed.logits[1])


def test_the_head_is_computed_for_wanted_rows_only(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = engine_of(model), []
    head = model.module.lm_head.forward

    def counted(hidden: torch.Tensor) -> Any:
        rows.append(hidden.shape[1])
        return head(hidden)

    monkeypatch.setattr(model.module.lm_head, "forward", counted)
    engine.forward([Segment(Sequence([0, 1], 0), ids(19)), Segment(Sequence([2], 1), ids(8), every_row=True)])
    assert rows == [2 + 8]
