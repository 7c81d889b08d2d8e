"""The C kernel of dequantize against its reference, and what a round trip through quantize may change."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zipserve.kernels.dequantize as op
from zip_blocks import Slabs, random_blocks
from zipserve.kernels import native, rotation
from zipserve.kernels.dequantize import dequantize, dequantize_reference
from zipserve.kernels.quantize import quantize_reference
from zipserve.kernels.zipformat import PROFILES, SINK_TOKENS, VALUE_STEPS, ZipFormat

SHAPES = [(3, 64, 64, 128), (1, 16, 16, 64), (2, 80, 48, 128), (3, 96, 64, 192), (2, 128, 256, 64)]
Decoded = tuple[torch.Tensor, torch.Tensor]
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _outputs_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written stays NaN."""

    def poisoned(*shape: int, **kwargs: Any) -> torch.Tensor:
        return torch.full(shape, torch.nan, **kwargs)

    monkeypatch.setattr(torch, "empty", poisoned)


def random_slabs(form: ZipFormat, at_start: list[bool], seed: int = 0) -> Arguments:
    """Any codes and exponents, with parameters that are finite: the arguments of `dequantize`, without the format."""
    generator = torch.Generator().manual_seed(seed)
    count = len(at_start)
    out = Slabs.filled(2 * count + 1, form.layer_bytes, 0)
    sinks = Slabs.filled(2 * count + 1, form.sinks_layer_bytes, 0)
    blocks = random_blocks(form, at_start, seed)
    for layer in out.layers:
        layer.copy_(torch.randint(256, layer.shape, generator=generator))
        for head in range(form.kv_heads):
            parameters = torch.randn(2, form.key_dim, generator=generator).half()
            parameters[1].abs_()
            start = form.head_offset(head)
            layer[start : start + 4 * form.key_dim] = parameters.view(torch.uint8).flatten()
            start += form.exponent_offset
            exponents = torch.randint(256, (form.block_tokens,), generator=generator)
            layer[start : start + form.block_tokens] = exponents
    for layer in sinks.layers:
        layer.copy_(torch.randn(form.sinks_layer_bytes // 2, generator=generator).half().view(torch.uint8))
    weights = 1 << torch.arange(8)
    for slab, hi in zip(blocks.slabs, blocks.hi, strict=True):
        out.layers[slab, : form.bitmap_bytes] = (hi.view(-1, 8) * weights).sum(1).to(torch.uint8)
    return out.layers, blocks.slabs, sinks.layers, blocks.sink_slabs


def decoded(form: ZipFormat, arguments: Arguments, decode: Any = dequantize) -> Decoded:
    layers, slabs, sinks, sink_slabs = arguments
    found: Decoded = decode(layers, slabs, form, sinks, sink_slabs)
    return found


def assert_same(found: Decoded, wanted: Decoded) -> None:
    """Within what float32 may change in a row: a few units of the last place of its length."""
    for x, y in zip(found, wanted, strict=True):
        assert (x.dtype, x.shape, x.is_contiguous()) == (torch.float32, y.shape, True)
        assert ((x - y).abs() <= 2.0**-21 * y.norm(dim=-1, keepdim=True)).all()


def test_the_kernel_is_there() -> None:
    """Otherwise everything below would compare the reference with itself."""
    assert native.load() is not None


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(shape: tuple[int, int, int, int], profile: str) -> None:
    form = ZipFormat(*shape, profile)
    arguments = random_slabs(form, [True, False, True])
    before = [argument.clone() for argument in arguments]
    assert_same(decoded(form, arguments), decoded(form, arguments, dequantize_reference))
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_block(data: st.DataObject) -> None:
    heads, key_dim, value_dim = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)))
    tokens, profile = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from(list(PROFILES)))
    form = ZipFormat(heads, 16 * key_dim, 16 * value_dim, tokens, profile)
    arguments = random_slabs(form, [data.draw(st.booleans())], data.draw(st.integers(0, 1 << 30)))
    assert_same(decoded(form, arguments), decoded(form, arguments, dequantize_reference))


def test_every_exponent() -> None:
    form = ZipFormat(1, 16, 16, 256)
    arguments = random_slabs(form, [False])
    start = form.head_offset(0) + form.exponent_offset
    arguments[0][:, start : start + 256] = torch.arange(256)
    assert_same(decoded(form, arguments), decoded(form, arguments, dequantize_reference))


def test_a_slab_may_be_read_twice() -> None:
    form = ZipFormat(2, 16, 32, 64)
    layers, slabs, sinks, sink_slabs = random_slabs(form, [True, False])
    twice, none = slabs[[0, 1, 0]], torch.full((3,), -1)
    keys, values = dequantize(layers, twice, form, sinks, none)
    assert torch.equal(keys[0], keys[2])
    assert torch.equal(values[0], values[2])
    with_sinks, _ = dequantize(layers, twice, form, sinks, sink_slabs[[0, 1, 0]])
    assert torch.equal(with_sinks[:, :, SINK_TOKENS:], keys[:, :, SINK_TOKENS:])
    assert not torch.equal(with_sinks[0, :, :SINK_TOKENS], keys[0, :, :SINK_TOKENS])


def test_no_blocks() -> None:
    keys, values = decoded(ZipFormat(2, 32, 48, 64), random_slabs(ZipFormat(2, 32, 48, 64), []))
    assert (keys.shape, values.shape) == ((0, 2, 64, 32), (0, 2, 64, 48))


def test_numbers_depend_neither_on_threads_nor_on_other_blocks() -> None:
    form = ZipFormat(3, 64, 80, 128, "43/32")
    arguments = layers, slabs, sinks, sink_slabs = random_slabs(form, [True, False, False, True, False])
    keys, values = decoded(form, arguments)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again, values_again = decoded(form, arguments)
        assert torch.equal(keys, again)
        assert torch.equal(values, values_again)
    for block in range(5):
        own, own_values = decoded(form, (layers, slabs[block : block + 1], sinks, sink_slabs[block : block + 1]))
        assert torch.equal(own[0], keys[block])
        assert torch.equal(own_values[0], values[block])


@pytest.mark.parametrize("profile", PROFILES)
def test_a_round_trip_moves_nothing_by_more_than_half_a_cell(profile: str) -> None:
    """In the rotated domain: keys by half a cell and float16's rounding of it, sinks by that of float16 alone. Values
    beyond the outermost cells are clipped, so that only their mean is bounded: 1/4 of a cell and what clipping adds."""
    form = ZipFormat(2, 64, 80, 128, profile)
    blocks = random_blocks(form, [True, False])
    out, sinks = (torch.zeros(5, size, dtype=torch.uint8) for size in (form.layer_bytes, form.sinks_layer_bytes))
    quantize_reference(blocks.keys, blocks.values, blocks.hi, form, out, blocks.slabs, sinks, blocks.sink_slabs)
    keys, values = dequantize(out, blocks.slabs, form, sinks, blocks.sink_slabs)
    error, value_error = (rotation.rotate(x - y).abs() for x, y in ((keys, blocks.keys), (values, blocks.values)))
    assert (error[0, :, :SINK_TOKENS] < 4e-3).all()
    assert (value_error[0, :, :SINK_TOKENS] < 4e-3).all()
    for is_hi, bits, value_bits in (
        (True, form.bits.key_hi, form.bits.value_hi),
        (False, form.bits.key_lo, form.bits.value_lo),
    ):
        of_class = blocks.hi[1] == is_hi
        rotated = rotation.rotate(blocks.keys[1])
        cell = (rotated.amax(1) - rotated.amin(1)) / 2**bits
        assert (error[1][:, of_class] <= 0.5 * cell[:, None] + 4e-3).all()
        assert value_error[1][:, of_class].mean() < 0.35 * VALUE_STEPS[value_bits]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(5, 99, dtype=torch.uint8), r"slabs must be torch.uint8 \[5, 1928\]"),
        (0, torch.zeros(5, 1928), "slabs must be torch.uint8"),
        (1, torch.zeros(2, dtype=torch.int32), "must be torch.int64"),
        (2, torch.zeros(256, 5, dtype=torch.uint8).T, r"with strides \[1, 5\]"),
        (3, torch.zeros(1, dtype=torch.int64), r"must be torch.int64 \[2\]"),
    ],
)
def test_arguments_that_would_be_read_wrongly(index: int, value: torch.Tensor, message: str) -> None:
    form = ZipFormat(2, 16, 16, 64)
    arguments: list[Any] = [*random_slabs(form, [True, False])]
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        decoded(form, tuple(arguments))


@pytest.mark.parametrize(("index", "slab"), [(1, -1), (1, 5), (3, 5)])
def test_slabs_that_do_not_exist(index: int, slab: int) -> None:
    form = ZipFormat(2, 16, 16, 64)
    arguments: list[Any] = [*random_slabs(form, [True, False])]
    arguments[index] = torch.tensor([0, slab])
    with pytest.raises(IndexError, match="block 1: no slab"):
        decoded(form, tuple(arguments))


@pytest.fixture
def fresh_native() -> Iterator[None]:
    """`native.load` forgets what it has loaded, before and after."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("fresh_native")
def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    form = ZipFormat(1, 16, 16, 64)
    arguments = random_slabs(form, [True])
    wanted = decoded(form, arguments)
    native.load.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    reference = Mock(wraps=dequantize_reference)
    monkeypatch.setattr(op, "dequantize_reference", reference)
    assert_same(decoded(form, arguments), wanted)
    reference.assert_called_once()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_narrower_vectors(level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of older CPUs; those of the first have as many lanes as ARM's."""
    flags = [f"-march={level}" if flag == "-march=native" else flag for flag in native.FLAGS]
    kernels = Path(native.__file__).parent
    command = ["cc", *flags, f"-I{kernels}", "-o", tmp_path / "op.so", kernels / "dequantize/dequantize.c", "-lm"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(tmp_path / "op.so"))
    monkeypatch.setattr(native, "load", lambda: library)
    for profile in ("4/32", "43/32"):
        for shape in SHAPES:
            form = ZipFormat(*shape, profile)
            arguments = random_slabs(form, [True, False])
            assert_same(decoded(form, arguments), decoded(form, arguments, dequantize_reference))
