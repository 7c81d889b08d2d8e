"""The C kernel of quantize: every byte is what the format's definition allows, and no other byte is written."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zipserve.kernels.quantize as op
from zip_blocks import Blocks, Slabs, assert_encoded, blocks_of, random_blocks
from zipserve.kernels import native
from zipserve.kernels.quantize import NON_FINITE, OUT_OF_RANGE, quantize, quantize_reference
from zipserve.kernels.zipformat import PROFILES, ZipFormat

SHAPES = [(3, 64, 64, 128), (1, 16, 16, 64), (2, 80, 48, 128), (3, 96, 64, 192), (2, 128, 256, 64)]
FILLS = (0xA5, 0x5A)
"""Of the memory before: each is the other's complement, so that no byte can be left as it was unnoticed."""


def encoded(blocks: Blocks, encode: Any = quantize, fill: int = 0) -> tuple[torch.Tensor, Slabs, Slabs]:
    """Status, layers and sinks."""
    form, count = blocks.form, 2 * len(blocks.slabs) + 1
    out, sinks = Slabs.filled(count, form.layer_bytes, fill), Slabs.filled(count, form.sinks_layer_bytes, fill)
    arguments = (blocks.keys, blocks.values, blocks.hi, form, out.layers, blocks.slabs, sinks.layers, blocks.sink_slabs)
    return encode(*arguments), out, sinks


def bytes_of(blocks: Blocks, encode: Any = quantize) -> tuple[torch.Tensor, torch.Tensor]:
    """Layers and sinks of blocks none of which is refused."""
    status, out, sinks = encoded(blocks, encode)
    assert status.tolist() == [0] * len(blocks.slabs)
    return out.layers, sinks.layers


def test_the_kernel_is_there() -> None:
    """Otherwise everything below would compare the reference with itself."""
    assert native.load() is not None


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("shape", "encode"), [*((shape, quantize) for shape in SHAPES), (SHAPES[2], quantize_reference)]
)
def test_every_byte_is_right(shape: tuple[int, int, int, int], encode: Any, profile: str) -> None:
    blocks = random_blocks(ZipFormat(*shape, profile), [True, False, False], strided=True)
    written = []
    for fill in FILLS:
        status, out, sinks = encoded(blocks, encode, fill)
        assert (status.dtype, status.tolist()) == (torch.int32, [0, 0, 0])
        assert out.untouched(fill, blocks.slabs)
        assert sinks.untouched(fill, blocks.sink_slabs[blocks.at_start])
        assert_encoded(blocks, out.layers, sinks.layers)
        written.append((out.layers[blocks.slabs], sinks.layers[blocks.sink_slabs[blocks.at_start]]))
    (layers, sink_layers), (layers_again, sink_layers_again) = written
    assert torch.equal(layers, layers_again)
    assert torch.equal(sink_layers, sink_layers_again)


@pytest.mark.parametrize("profile", PROFILES)
def test_bytes_are_those_of_the_reference(profile: str) -> None:
    """All of them, where float32 holds every sum of a rotation exactly and no number lies at a border."""
    form = ZipFormat(2, 64, 64, 128, profile)
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randint(-(1 << 17), 1 << 17, (2, 2, 128, 64), generator=generator) / 2**15 for _ in range(2))
    blocks = blocks_of(keys, values, form, torch.tensor([True, False]), generator)
    for found, wanted in zip(bytes_of(blocks), bytes_of(blocks, quantize_reference), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    blocks = random_blocks(ZipFormat(2, 32, 48, 64, "43/32"), [True, False], strided=True)
    blocks = replace(blocks, keys=blocks.keys.to(dtype), values=blocks.values.to(dtype))
    for found, wanted in zip(bytes_of(blocks), bytes_of(blocks.float()), strict=True):
        assert torch.equal(found, wanted)


def test_no_blocks() -> None:
    status, out, sinks = encoded(random_blocks(ZipFormat(2, 32, 32, 64), []), fill=7)
    assert (status.dtype, status.shape) == (torch.int32, (0,))
    assert (out.memory == 7).all()
    assert (sinks.memory == 7).all()


PLACES = [0, 3, 4, 63]
"""Tokens: the first and the last of the sinks, and of the others."""
FORBIDDEN = [torch.nan, torch.inf, -torch.inf, 7e4, -7e4, 1e7, -1e7, 1e19, 1e30, -1e37, 3e38]


@pytest.mark.parametrize("value", FORBIDDEN)
@pytest.mark.parametrize("in_keys", [True, False])
def test_refusals(value: float, in_keys: bool) -> None:
    """As the reference does, wherever the number stands, and without a trace in the block beside it."""
    form = ZipFormat(2, 32, 48, 64)
    intact = random_blocks(form, [False, True])
    wanted = bytes_of(intact)
    for at_start in (False, True):
        for token in PLACES:
            for head, channel in ((0, 0), (1, 31)):
                blocks = random_blocks(form, [at_start, True])
                blocks = replace(blocks, hi=torch.stack((blocks.hi[0], intact.hi[1])))
                blocks = replace(blocks, slabs=intact.slabs, sink_slabs=torch.where(blocks.at_start, intact.slabs, -1))
                blocks = replace(blocks, keys=intact.keys.clone(), values=intact.values.clone())
                (blocks.keys if in_keys else blocks.values)[0, head, token, channel] = value
                status, out, sinks = encoded(blocks)
                assert status.tolist() == encoded(blocks, quantize_reference)[0].tolist()
                if not (in_keys and abs(value) < 1e5):  # one such key may fit
                    assert status[0] == (OUT_OF_RANGE if abs(value) < torch.inf else NON_FINITE)
                assert torch.equal(out.layers[blocks.slabs[1]], wanted[0][intact.slabs[1]])
                assert torch.equal(sinks.layers[blocks.sink_slabs[1]], wanted[1][intact.sink_slabs[1]])
                assert out.untouched(0, blocks.slabs)


def test_what_is_not_finite_comes_first() -> None:
    """Of two reasons in one block, whichever head or half of it they are in."""
    form = ZipFormat(2, 16, 16, 64)
    for first, second in (((0, 0), (1, 1)), ((1, 1), (0, 0)), ((0, 1), (1, 0)), ((1, 0), (0, 1))):
        blocks = random_blocks(form, [False])
        for (half, head), value in ((first, 1e9), (second, torch.nan)):
            (blocks.keys, blocks.values)[half][0, head, 20, 3] = value
        assert encoded(blocks)[0].tolist() == [NON_FINITE] == encoded(blocks, quantize_reference)[0].tolist()


def zeros(x: torch.Tensor) -> None:
    x.zero_()


def a_row_of_zeros(x: torch.Tensor) -> None:
    x[:, :, 5] = 0


def equal_rows(x: torch.Tensor) -> None:
    x[:] = x[:, :, :1].clone()


def an_outlier_channel(x: torch.Tensor) -> None:
    x[..., 7] += 300


def an_outlier_token(x: torch.Tensor) -> None:
    x[:, :, 9] *= 1000


def below_normal_float16(x: torch.Tensor) -> None:
    x *= 1e-5


def tiny(x: torch.Tensor) -> None:
    x *= 1e-9


def large(x: torch.Tensor) -> None:
    x *= 1500


@pytest.mark.parametrize(
    "change",
    [zeros, a_row_of_zeros, equal_rows, an_outlier_channel, an_outlier_token, below_normal_float16, tiny, large],
)
@pytest.mark.parametrize("profile", ["4/32", "43/32"])
def test_unusual_numbers(change: Any, profile: str) -> None:
    blocks = random_blocks(ZipFormat(2, 64, 32, 128, profile), [True, False])
    change(blocks.keys)
    change(blocks.values)
    assert_encoded(blocks, *bytes_of(blocks))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_block(data: st.DataObject) -> None:
    """Shapes, profiles, magnitudes and channels of all kinds; those that the reference refuses are refused."""
    heads, key_dim, value_dim = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)))
    tokens, profile = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from(list(PROFILES)))
    form = ZipFormat(heads, 16 * key_dim, 16 * value_dim, tokens, profile)
    blocks = random_blocks(form, [data.draw(st.booleans())], data.draw(st.integers(0, 1 << 30)))
    for x in (blocks.keys, blocks.values):
        x.mul_(10.0 ** data.draw(st.integers(-6, 3)))
        x[..., data.draw(st.integers(0, x.shape[-1] - 1))] *= data.draw(st.sampled_from([0.0, 1.0, 30.0]))
        x[:, :, data.draw(st.integers(0, tokens - 1))] *= data.draw(st.sampled_from([0.0, 1.0, 30.0]))
        x.add_(data.draw(st.sampled_from([0.0, 1.0])) * x.abs().mean())
    status, out, sinks = encoded(blocks)
    assert torch.equal(status, encoded(blocks, quantize_reference)[0])
    if status == 0:
        assert_encoded(blocks, out.layers, sinks.layers)


def test_bytes_depend_neither_on_threads_nor_on_other_blocks() -> None:
    blocks = random_blocks(ZipFormat(3, 64, 80, 128, "43/32"), [True, False, False, True, False])
    layers, sinks = bytes_of(blocks)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again, sinks_again = bytes_of(blocks)
        assert torch.equal(layers, again)
        assert torch.equal(sinks, sinks_again)
    for block, (slab, sink_slab) in enumerate(zip(blocks.slabs, blocks.sink_slabs, strict=True)):
        alone = replace(blocks.only(block), slabs=torch.tensor([0]), sink_slabs=sink_slab[None].clamp_max(1))
        own, own_sinks = bytes_of(alone)
        assert torch.equal(own[0], layers[slab])
        if sink_slab >= 0:
            assert torch.equal(own_sinks[alone.sink_slabs[0]], sinks[sink_slab])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keys", torch.zeros(2, 2, 64, 32), r"keys must be \[2, 2, 64, 16\]"),
        ("values", torch.zeros(2, 2, 32, 64).transpose(2, 3), r"values must be \[2, 2, 64, 32\]"),
        ("hi", torch.zeros(2, 32, dtype=torch.bool), r"hi must be torch.bool \[2, 64\]"),
        ("hi", torch.zeros(2, 64, dtype=torch.uint8), "hi must be torch.bool"),
        ("slabs", torch.zeros(2, dtype=torch.int32), "must be torch.int64"),
        ("sink_slabs", torch.zeros(1, dtype=torch.int64), r"must be torch.int64 \[2\]"),
    ],
)
def test_arguments_that_would_be_read_wrongly(name: str, value: torch.Tensor, message: str) -> None:
    blocks = random_blocks(ZipFormat(2, 16, 32, 64), [True, False])
    change: Any = {name: value}
    with pytest.raises(ValueError, match=message):
        encoded(replace(blocks, **change))


@pytest.mark.parametrize(("name", "slab"), [("slabs", -1), ("slabs", 5), ("sink_slabs", 5)])
def test_slabs_that_do_not_exist(name: str, slab: int) -> None:
    """Nothing at all is written then."""
    blocks = random_blocks(ZipFormat(2, 16, 16, 64), [True, False])
    change: Any = {name: torch.tensor([0, slab])}
    blocks = replace(blocks, **change)
    form = blocks.form
    out, sinks = Slabs.filled(5, form.layer_bytes, 9), Slabs.filled(5, form.sinks_layer_bytes, 9)
    with pytest.raises(IndexError, match="block 1: no slab"):
        quantize(blocks.keys, blocks.values, blocks.hi, form, out.layers, blocks.slabs, sinks.layers, blocks.sink_slabs)
    assert (out.memory == 9).all()
    assert (sinks.memory == 9).all()


@pytest.fixture
def fresh_native() -> Iterator[None]:
    """`native.load` forgets what it has loaded, before and after."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("fresh_native")
def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(ZipFormat(1, 16, 16, 64), [True])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    reference = Mock(wraps=quantize_reference)
    monkeypatch.setattr(op, "quantize_reference", reference)
    assert_encoded(blocks, *bytes_of(blocks))
    reference.assert_called_once()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_narrower_vectors(level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of older CPUs; those of the first have as many lanes as ARM's."""
    flags = [f"-march={level}" if flag == "-march=native" else flag for flag in native.FLAGS]
    kernels = Path(native.__file__).parent
    command = ["cc", *flags, f"-I{kernels}", "-o", tmp_path / "op.so", kernels / "quantize/quantize.c", "-lm"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(tmp_path / "op.so"))
    monkeypatch.setattr(native, "load", lambda: library)
    for profile in ("4/32", "43/32"):
        for shape in SHAPES:
            blocks = random_blocks(ZipFormat(*shape, profile), [True, False])
            assert_encoded(blocks, *bytes_of(blocks))
