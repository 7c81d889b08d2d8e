"""The zip codec: sizes, golden vectors of an independent implementation, and what the format promises.

The golden vectors go through the references and through the public functions; all else is about the references.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zipserve.kernels import rotation
from zipserve.kernels.dequantize import dequantize, dequantize_reference
from zipserve.kernels.dequantize.reference import decode_block, unpack
from zipserve.kernels.quantize import NON_FINITE, OUT_OF_RANGE, quantize, quantize_reference
from zipserve.kernels.quantize.reference import pack
from zipserve.kernels.saliency import classify
from zipserve.kernels.zipformat import PROFILES, SINK_TOKENS, Region, ZipFormat, probe_counts, probe_offsets

VECTORS = {name: torch.from_numpy(array) for name, array in np.load(Path(__file__).parent / "zip_vectors.npz").items()}
REFERENCES = (quantize_reference, dequantize_reference)
CASES = [(profile, first) for profile in PROFILES for first in (False, True)]


def classes_of(form: ZipFormat, hi: torch.Tensor, *, at_start: bool) -> torch.Tensor:
    """The class mask of the vectors as scores, so that sinks and one-class profiles are treated as everywhere."""
    scores = hi.float() * torch.tensor(probe_counts(form.block_tokens))
    return classify(scores[None], form, torch.tensor([at_start]))


def round_trip(
    keys: torch.Tensor,
    values: torch.Tensor,
    hi: torch.Tensor,
    form: ZipFormat,
    *,
    at_start: bool,
    codec: tuple[Any, Any] = REFERENCES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of one block, decoded, and its bytes."""
    encode, decode = codec
    data = torch.zeros(1, form.layer_bytes, dtype=torch.uint8)
    sinks = torch.zeros(1, form.sinks_layer_bytes, dtype=torch.uint8)
    slab = torch.zeros(1, dtype=torch.int64)
    sink_slab = slab if at_start else slab - 1
    status = encode(keys[None], values[None], hi, form, data, slab, sinks, sink_slab)
    assert status.tolist() == [0]
    decoded_keys, decoded_values = decode(data, slab, form, sinks, sink_slab)
    return decoded_keys[0], decoded_values[0], data[0]


@pytest.mark.parametrize("codec", [REFERENCES, (quantize, dequantize)])
@pytest.mark.parametrize(("profile", "first"), CASES)
def test_golden_vectors(profile: str, first: bool, codec: tuple[Any, Any]) -> None:
    """Everything equals, apart from codes within 1e-3 of a cell's border."""
    form = ZipFormat(3, 64, 64, 128, profile)
    name = f"{profile.replace('/', '_')}_{'first' if first else 'next'}"
    keys, values, query = VECTORS["K"], VECTORS["V"], VECTORS["q"]
    hi = classes_of(form, VECTORS["hi"], at_start=first)
    found_keys, found_values, data = round_trip(keys, values, hi, form, at_start=first, codec=codec)
    assert form.layer_bytes + first * form.sinks_layer_bytes == int(VECTORS[f"{name}_bytes"])
    found, wanted = rotation.rotate(found_keys), rotation.rotate(VECTORS[f"{name}_K"])
    differs = (found - wanted).abs() > 1e-4
    assert (cells_of(rotation.rotate(keys), data, form, hi)[differs] < 1e-3).all()
    assert differs.sum() <= 2
    torch.testing.assert_close(found_values, VECTORS[f"{name}_V"], rtol=0, atol=1e-4)
    # with the border's code as in the vectors
    agreed = rotation.unrotate(torch.where(differs, wanted, found))
    weights = torch.softmax((query[:, None] * agreed).sum(-1) * 64**-0.5, -1)
    attention = torch.matmul(weights[:, None], found_values)[:, 0]
    torch.testing.assert_close(attention, VECTORS[f"{name}_attention"], rtol=0, atol=1e-4)


def cells_of(keys: torch.Tensor, data: torch.Tensor, form: ZipFormat, hi: torch.Tensor) -> torch.Tensor:
    """Distance of every key to the next border between cells, in cells."""
    bits = torch.where(hi[0], form.bits.key_hi, form.bits.key_lo)[:, None]
    distance = torch.empty_like(keys)
    for head in range(form.kv_heads):
        start = form.head_offset(head)
        lo, width = data[start : start + 4 * form.key_dim].view(torch.float16).float().view(2, -1)
        cells = (keys[head] - lo) * 2.0**bits / width
        distance[head] = (cells - cells.round()).abs()
    return distance


def test_sizes_are_those_of_the_formula() -> None:
    """All-in bits per value: 1/2 [bK + 32/C + bV + 8/D] + 1/(2HD); the ratios are those against 16 bits."""
    for (heads, dim), profile, bits in [
        ((3, 64), "4/32", 3.4401),
        ((8, 128), "4/4", 4.1567),
        ((8, 128), "4/3", 3.6567),
        ((8, 128), "4/32", 3.4067),
        ((8, 128), "43/32", 3.1567),
        ((8, 128), "4/2", 3.1567),
        ((8, 128), "3/2", 2.6567),
    ]:
        form = ZipFormat(heads, dim, dim, 128, profile)
        assert 8 * form.layer_bytes / (heads * 2 * dim * 128) == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("heads", "key_dim", "value_dim", "tokens"), [(1, 16, 16, 64), (2, 80, 48, 128), (3, 96, 64, 192)]
)
def test_round_trip_of_odd_shapes(profile: str, heads: int, key_dim: int, value_dim: int, tokens: int) -> None:
    form = ZipFormat(heads, key_dim, value_dim, tokens, profile)
    generator = torch.Generator().manual_seed(heads)
    keys = torch.randn(heads, tokens, key_dim, generator=generator)
    values = torch.randn(heads, tokens, value_dim, generator=generator)
    scores = torch.rand(1, tokens, generator=generator)
    for at_start in (False, True):
        hi = classify(scores, form, torch.tensor([at_start]))
        assert hi.sum() == form.hi_tokens
        found_keys, found_values, _ = round_trip(keys, values, hi, form, at_start=at_start)
        for found, wanted, limit in ((found_keys, keys, 0.25), (found_values, values, 0.4)):
            assert (found - wanted).norm() / wanted.norm() < limit
        if at_start:
            torch.testing.assert_close(found_keys[:, :SINK_TOKENS], keys[:, :SINK_TOKENS], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize(("tokens", "dim"), [(32, 16), (64, 64), (96, 80)])
def test_packing_is_reversible(bits: int, is_key: bool, tokens: int, dim: int) -> None:
    region = Region(8, bits, tokens, dim, is_key)
    codes = torch.randint(1 << bits, (tokens, dim), generator=torch.Generator().manual_seed(0))
    data = pack(codes, region)
    assert len(data) == region.end - region.offset
    assert torch.equal(unpack(torch.cat((torch.zeros(8, dtype=torch.uint8), data)), region), codes)


def test_four_bit_codes_nest_three_bit_ones() -> None:
    keys = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(0))
    forms = [ZipFormat(1, 64, 64, 128, profile) for profile in ("4/2", "3/2")]
    hi = classify(torch.zeros(1, 128), forms[0], torch.tensor([False]))
    segments = [round_trip(keys, keys, hi, form, at_start=False)[2][form.bitmap_bytes :] for form in forms]
    four, three = (unpack(segment, form.keys[0]) for segment, form in zip(segments, forms, strict=True))
    assert torch.equal(four >> 1, three)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("in_keys", [True, False])
def test_refuses_what_is_not_finite(value: float, in_keys: bool) -> None:
    assert status_with(value, in_keys=in_keys, at_start=False) == NON_FINITE


@pytest.mark.parametrize(("in_keys", "at_start"), [(True, False), (True, True), (False, False), (False, True)])
def test_refuses_what_parameters_cannot_hold(in_keys: bool, at_start: bool) -> None:
    assert status_with(1e7, in_keys=in_keys, at_start=at_start) == OUT_OF_RANGE


def status_with(value: float, *, in_keys: bool, at_start: bool) -> int:
    """Of a block with `value` at one place, among the sinks if it has any."""
    form = ZipFormat(2, 16, 16, 64)
    keys, values = (torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    (keys if in_keys else values)[0, 1, 2, 5] = value
    hi = classify(torch.zeros(1, 64), form, torch.tensor([at_start]))
    data = torch.zeros(1, form.layer_bytes, dtype=torch.uint8)
    sinks = torch.zeros(1, form.sinks_layer_bytes, dtype=torch.uint8)
    slab = torch.zeros(1, dtype=torch.int64)
    status = quantize_reference(keys, values, hi, form, data, slab, sinks, slab if at_start else slab - 1)
    return int(status[0])


def test_constant_channels_zeros_and_large_values_survive() -> None:
    form = ZipFormat(1, 16, 16, 64, "3/2")
    hi = classify(torch.zeros(1, 64), form, torch.tensor([False]))
    zeros = torch.zeros(1, 64, 16)
    keys, values, _ = round_trip(zeros, zeros, hi, form, at_start=False)
    assert keys.abs().max() < 1e-3
    assert values.abs().max() < 1e-5
    constant = rotation.unrotate(torch.arange(16.0).expand(1, 64, 16) - 7)
    keys, _, _ = round_trip(constant, zeros, hi, form, at_start=False)
    torch.testing.assert_close(keys, constant, rtol=0, atol=2e-3)
    outlier = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    outlier[0, 9, 3] = 3000.0
    keys, values, _ = round_trip(outlier, outlier, hi, form, at_start=False)
    assert keys.isfinite().all()
    assert values.isfinite().all()


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128])
def test_rotation_is_orthogonal(dim: int) -> None:
    matrix = rotation.matrix(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), rtol=0, atol=1e-6)
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x)), x, rtol=0, atol=1e-5)


def test_probes_are_fixed() -> None:
    assert probe_offsets(128) == [3, 20, 37, 54, 71, 88, 105, 121, 122, 123, 124, 125, 126, 127]
    counts = probe_counts(128)
    assert (counts[0], counts[3], counts[4], counts[127]) == (14, 14, 13, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 16, 16, 96), "block_tokens that is a multiple of 64, not 96"),
        ((2, 24, 16, 128), "key_dim that is a multiple of 16, not 24"),
        ((2, 16, 24, 128), "value_dim that is a multiple of 16, not 24"),
        ((2, 16, 16, 128, "5/5"), "profile '5/5' is unknown; known: 4/4, "),
    ],
)
def test_shapes_that_the_format_does_not_know(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZipFormat(*arguments)


def test_bytes_do_not_depend_on_what_was_there() -> None:
    form = ZipFormat(2, 32, 16, 64, "43/32")
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(1, 2, 64, 32, generator=generator), torch.randn(1, 2, 64, 16, generator=generator)
    hi = classify(torch.rand(1, 64, generator=generator), form, torch.tensor([False]))
    slab = torch.zeros(1, dtype=torch.int64)
    data = [torch.full((1, form.layer_bytes), fill, dtype=torch.uint8) for fill in (0, 255)]
    for out in data:
        quantize_reference(keys, values, hi, form, out, slab, out, slab - 1)
    assert torch.equal(*data)
    keys_again, _ = decode_block(data[0][0], form, None)
    assert keys_again.isfinite().all()
