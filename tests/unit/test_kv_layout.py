"""Layout: every field is in the fingerprint, and sizes add up."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import LayoutMismatchError
from zipserve.common.kv import layout as layouts
from zipserve.common.kv.layout import CODECS, HEADER_BYTES, SLAB_ALIGNMENT_BYTES, Layout, SlabKind
from zipserve.common.kv.refs import layout_of, message_of
from zipserve.v1.kv_pb2 import KvLayout

BASE = Layout(
    model="model", revision="0123", layers=3, kv_heads=2, key_dim=16, value_dim=32, dtype="float32", block_tokens=64
)
OTHER: dict[str, Any] = {
    "model": "other",
    "revision": "0124",
    "layers": 4,
    "kv_heads": 3,
    "key_dim": 32,
    "value_dim": 16,
    "dtype": "bfloat16",
    "codec": "zip-4/32",
    "block_tokens": 128,
    "rank": 1,
    "ranks": 2,
    "version": layouts.LAYOUT_VERSION + 1,
}
LAYOUTS = st.builds(
    Layout,
    model=st.text(min_size=1),
    revision=st.text(min_size=1),
    layers=st.integers(1, 96),
    kv_heads=st.integers(1, 64),
    key_dim=st.integers(1, 16).map(lambda n: 16 * n),
    value_dim=st.integers(1, 16).map(lambda n: 16 * n),
    dtype=st.sampled_from(layouts.MODEL_DTYPES),
    codec=st.sampled_from(layouts.CODECS),
    block_tokens=st.integers(1, 4).map(lambda n: 64 * n),
)


def test_there_is_another_value_for_every_field() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Layout)}


@pytest.mark.parametrize("field", sorted(OTHER))
def test_fingerprint_and_description_change_with(field: str) -> None:
    changed = dataclasses.replace(BASE, **{field: OTHER[field]})
    assert changed.fingerprint != BASE.fingerprint
    assert changed.description != BASE.description, "a refusal could not say what differs"


def test_fingerprint_is_the_same_in_every_process() -> None:
    """Of a fixed layout: a change means that old and new workers no longer understand each other."""
    assert BASE.fingerprint == dataclasses.replace(BASE).fingerprint
    assert BASE.fingerprint.hex() == "1016e3ef14c71a9204b2213614adbd2e95a542ea053ef3436b711988679c1a2e"


@pytest.mark.parametrize(("field", "value"), [("codec", "zap"), ("dtype", "int8"), ("codec", ""), ("dtype", "float64")])
def test_unknown_codec_or_dtype(field: str, value: str) -> None:
    with pytest.raises(LayoutMismatchError, match=f"{field} {value!r} is unknown; known: "):
        dataclasses.replace(BASE, **{field: value})  # type: ignore[arg-type]  # a field of strings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codec": "int4", "key_dim": 20},
            "int4 cannot code this model: it needs head dimensions that are multiples of 8",
        ),
        ({"codec": "zipcache", "block_tokens": 24}, "a block_tokens that is a multiple of 16, not 24"),
        ({"codec": "zip-4/4", "value_dim": 24}, "a value_dim that is a multiple of 16, not 24; codec raw can"),
        ({"codec": "zip-3/2", "block_tokens": 96}, "a block_tokens that is a multiple of 64, not 96"),
    ],
)
def test_shapes_that_a_codec_cannot_code(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        dataclasses.replace(BASE, **changes)


@given(LAYOUTS, st.data())
def test_sizes(layout: Layout, data: st.DataObject) -> None:
    for kind in layout.kinds():
        tokens = layout.tokens_of(kind)
        if kind is SlabKind.TAIL:
            tokens = data.draw(st.integers(0, tokens))
        record = sum(field.size_bytes for field in layout.fields(kind, tokens))
        assert layout.payload_bytes(kind, tokens) == layout.layers * record
        assert layout.wire_bytes(kind, tokens) == HEADER_BYTES + layout.payload_bytes(kind, tokens)
        needed, slab = layout.wire_bytes(kind, layout.tokens_of(kind)), layout.slab_bytes(kind)
        assert slab % SLAB_ALIGNMENT_BYTES == 0
        assert needed <= slab < needed + SLAB_ALIGNMENT_BYTES
    assert bool(layout.slab_bytes(SlabKind.SINKS)) == layout.has_sinks


@given(LAYOUTS, st.sampled_from(SlabKind), st.integers(0, 63))
def test_every_field_is_aligned_in_every_layer(layout: Layout, kind: SlabKind, tokens: int) -> None:
    fields = layout.fields(kind, tokens)
    record, at = sum(field.size_bytes for field in fields), HEADER_BYTES
    for field in fields:
        size = layouts.DTYPE_BYTES[field.dtype]
        assert at % size == 0
        assert record % size == 0
        at += field.size_bytes


@pytest.mark.parametrize(
    ("codec", "bits"),
    [("raw", 16), ("int8", 8.125), ("int4", 4.25), ("zipcache", 3.5625), ("zip-4/4", 4.157), ("zip-4/3", 3.657),
     ("zip-4/32", 3.407), ("zip-43/32", 3.157), ("zip-4/2", 3.157), ("zip-3/2", 2.657)],
)  # fmt: skip
def test_bits_of_sealed_blocks_for_the_shapes_of_llama_3_8b(codec: str, bits: float) -> None:
    llama = Layout("llama", "0", 32, 8, 128, 128, "bfloat16", codec)
    assert llama.bits_per_value() == pytest.approx(bits, abs=6e-4 if codec != "zipcache" else 0.1)


def test_bits_of_a_sequence_count_tail_sinks_and_headers() -> None:
    smollm2 = Layout("smollm2", "0", 30, 3, 64, 64, "float32", "zip-4/32")
    values = 30 * 3 * 128
    sinks, block = 30 * 3 * 4 * 128 * 2 + HEADER_BYTES, 30 * 21136 + HEADER_BYTES
    tail = 104 * 30 * (4 + 3 * (128 + 4)) + HEADER_BYTES
    assert smollm2.sequence_bytes(1000) == 7 * block + sinks + tail
    assert smollm2.bits_per_value(1000) == 8 * (7 * block + sinks + tail) / (1000 * values)
    assert smollm2.sequence_bytes(127) == 127 * 30 * (4 + 3 * (128 + 4)) + HEADER_BYTES
    assert smollm2.sequence_bytes(128) == block + sinks
    assert smollm2.slabs_of(0) == []


@given(LAYOUTS, st.integers(0, 10_000))
def test_blocks_for(layout: Layout, tokens: int) -> None:
    blocks = layout.blocks_for(tokens)
    assert blocks * layout.block_tokens >= tokens > (blocks - 1) * layout.block_tokens or tokens == blocks == 0


@pytest.mark.parametrize("codec", CODECS)
def test_a_layout_travels(codec: str) -> None:
    layout = Layout("m", "r" * 64, 2, 3, 64, 64, "float32", codec, block_tokens=64, rank=1, ranks=2)
    assert layout_of(KvLayout.FromString(message_of(layout).SerializeToString())) == layout


def test_a_layout_that_nobody_knows_is_refused() -> None:
    message = message_of(Layout("m", "r", 2, 3, 64, 64, "float32"))
    message.codec = "zip-9/9"
    with pytest.raises(LayoutMismatchError, match="zip-9/9"):
        layout_of(message)
