"""Layout: every field is in the fingerprint, and sizes add up."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import LayoutMismatchError
from zipserve.common.kv import layout as layouts
from zipserve.common.kv.layout import HEADER_BYTES, SLAB_ALIGNMENT_BYTES, Layout

BASE = Layout(
    model="model", revision="0123", layers=3, kv_heads=2, key_dim=16, value_dim=24, dtype="float32", block_tokens=32
)
OTHER: dict[str, Any] = {
    "model": "other",
    "revision": "0124",
    "layers": 4,
    "kv_heads": 3,
    "key_dim": 24,
    "value_dim": 16,
    "dtype": "bfloat16",
    "codec": "zip",
    "block_tokens": 64,
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
    key_dim=st.integers(1, 256),
    value_dim=st.integers(1, 256),
    dtype=st.sampled_from(sorted(layouts.DTYPE_BYTES)),
    block_tokens=st.integers(1, 16).map(lambda n: 16 * n),
)


def test_there_is_another_value_for_every_field() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Layout)}


@pytest.mark.parametrize("field", sorted(OTHER))
def test_fingerprint_and_description_change_with(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "CODECS", ("raw", "zip"))
    changed = dataclasses.replace(BASE, **{field: OTHER[field]})
    assert changed.fingerprint != BASE.fingerprint
    assert changed.description != BASE.description, "a refusal could not say what differs"


def test_fingerprint_is_the_same_in_every_process() -> None:
    """Of a fixed layout: a change means that old and new workers no longer understand each other."""
    assert BASE.fingerprint == dataclasses.replace(BASE).fingerprint
    assert BASE.fingerprint.hex() == "21b87bfc482e0bd82039a10fb16fc9b643857b03a8a6dda57566bdcb7fb27cac"


@pytest.mark.parametrize(("field", "value"), [("codec", "zap"), ("dtype", "int8"), ("codec", ""), ("dtype", "float64")])
def test_unknown_codec_or_dtype(field: str, value: str) -> None:
    with pytest.raises(LayoutMismatchError, match=f"{field} {value!r} is unknown; known: "):
        dataclasses.replace(BASE, **{field: value})  # type: ignore[arg-type]  # a field of strings


@given(LAYOUTS, st.data())
def test_sizes(layout: Layout, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, layout.block_tokens))
    per_token = layout.layers * layout.kv_heads * (layout.key_dim + layout.value_dim)
    assert layout.payload_bytes(tokens) == tokens * per_token * layouts.DTYPE_BYTES[layout.dtype]
    assert layout.tail_bytes(tokens) == HEADER_BYTES + layout.payload_bytes(tokens)
    assert layout.block_bytes == HEADER_BYTES + layout.payload_bytes(layout.block_tokens)
    for slab, needed in (
        (layout.block_slab_bytes, layout.block_bytes),
        (layout.tail_slab_bytes, layout.tail_bytes(layout.block_tokens - 1)),
    ):
        assert slab % SLAB_ALIGNMENT_BYTES == 0
        assert needed <= slab < needed + SLAB_ALIGNMENT_BYTES


@given(LAYOUTS, st.integers(0, 10_000))
def test_blocks_for(layout: Layout, tokens: int) -> None:
    blocks = layout.blocks_for(tokens)
    assert blocks * layout.block_tokens >= tokens > (blocks - 1) * layout.block_tokens or tokens == blocks == 0
