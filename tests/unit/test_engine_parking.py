"""Parked KV comes back byte for byte, wherever it is put."""

from pathlib import Path

import pytest
import torch

from zipserve.common import models
from zipserve.common.kv.layout import HEADER_BYTES, Layout, SlabKind
from zipserve.engine import loader
from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.parking import park, parked_bytes, restore
from zipserve.engine.sequence import Segment, Sequence

BLOCK = 64
CODECS = ["raw", "zipcache", "zip-4/32"]


def engine_of(folder: Path, codec: str) -> Engine:
    model = loader.load(models.resolve(str(folder)), "float32", "cpu")
    return Engine(model, KvCache(model.layout(codec, BLOCK), 8, 2, 2, 2))


def token_ids(count: int) -> list[int]:
    return [3 + i * 37 % 250 for i in range(count)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tokens", [5, BLOCK, 2 * BLOCK + 60])
def test_it_goes_on_as_if_nothing_had_happened(codec: str, tokens: int, tiny_model: Path) -> None:
    engine = engine_of(tiny_model, codec)
    cache, layout = engine.cache, engine.cache.layout
    sequence = Sequence([0, 1, 2, 3], slot=0, sinks=0)
    engine.forward([Segment(sequence, token_ids(tokens))])
    parked = park(cache, sequence)
    size_bytes = sum(part.nbytes for part in vars(parked).values())
    assert size_bytes == parked_bytes(layout, tokens)
    moved = Sequence([7, 4, 5, 6], slot=1, length=tokens, sinks=1)
    for part in (cache.arenas.blocks[4:], cache.arenas.sinks[1:]):
        part.fill_(0xFF)
    for part in (cache.open_keys[:, 1], cache.open_values[:, 1], cache.open_scores[:, 1]):
        part.fill_(torch.nan)
    restore(cache, parked, moved)
    for step in range(BLOCK + 6):  # past the next block's end: the scores of the open block decide its bytes
        logits = [engine.forward([Segment(of, [5 + step])]).logits for of in (sequence, moved)]
        assert torch.equal(*logits), f"after {step} tokens"
    payload = slice(HEADER_BYTES, layout.wire_bytes(SlabKind.BLOCK, BLOCK))
    sealed = sequence.length // BLOCK
    stayed, came_back = (cache.arenas.blocks[of.blocks[:sealed]][:, payload] for of in (sequence, moved))
    assert torch.equal(stayed, came_back)


def test_what_was_copied_out_is_a_copy(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, "zip-4/32")
    sequence = Sequence([0, 1, 2, 3], slot=0, sinks=0)
    engine.forward([Segment(sequence, token_ids(BLOCK + 10))])
    parked = park(engine.cache, sequence)
    before = [part.clone() for part in vars(parked).values()]
    arenas = engine.cache.arenas
    for part in (arenas.blocks, arenas.sinks, engine.cache.open_keys, engine.cache.open_values):
        part.zero_()
    engine.cache.open_scores.fill_(7.0)
    for part, expected in zip(vars(parked).values(), before, strict=True):
        assert torch.equal(part, expected)


def test_a_short_sequence_has_no_sealed_bytes() -> None:
    layout = Layout("m", "0", 1, 1, 16, 16, "float32", "raw", BLOCK)
    assert parked_bytes(layout, 1) == 32 * 4 + BLOCK * 4
