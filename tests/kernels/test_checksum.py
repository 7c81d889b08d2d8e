"""The checksum's C kernel against its reference, and what both promise to detect."""

import ctypes
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.kernels import native
from zipserve.kernels.checksum import checksum, checksum_reference

SIZES = [*range(70), 95, 96, 97, 127, 128, 129, 255, 1023, 4096, 4099, 65_535, 65_536, 1_000_003]
MASK = (1 << 64) - 1


def data_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def python_checksum(data: bytes, seed: int = 0) -> int:
    """The formula of the package's docstring, word by word, in plain Python."""
    padded = data + bytes(-len(data) % 4)
    words = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)]
    a, b = 0x9E3779B97F4A7C15, 2 * 0xD1B54A32D192ED03
    x = (seed + a * sum(words) + b * sum(i * w for i, w in enumerate(words)) + len(data)) & MASK
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = ((x ^ (x >> 33)) * factor) & MASK
    return x ^ (x >> 33)


@pytest.fixture
def fresh_native() -> Iterator[None]:
    """`native.load` forgets what it has loaded, before and after."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def test_the_kernel_is_there() -> None:
    """Otherwise everything below would compare the reference with itself."""
    assert native.load() is not None


@pytest.mark.parametrize("size", SIZES)
def test_kernel_is_the_reference(size: int) -> None:
    data = data_of(size, size)
    for seed in (0, 1, MASK):
        expected = checksum_reference(np.frombuffer(data, np.uint8), seed)
        assert checksum(data, seed) == expected
        if size < 5000:
            assert python_checksum(data, seed) == expected


@pytest.mark.parametrize("start", range(1, 34))
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 100, 1000])
def test_unaligned_starts(start: int, size: int) -> None:
    data = data_of(start + size)
    assert checksum(memoryview(data)[start:]) == checksum(data[start:]) == python_checksum(data[start:])


def test_all_bits_set() -> None:
    """Sums that overflow 64 bits wrap the same way in both."""
    data = b"\xff" * 1_000_000
    assert checksum(data) == checksum_reference(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_every_kind_of_buffer(kind: type[bytes]) -> None:
    assert checksum(kind(data_of(1001))) == python_checksum(data_of(1001))


def test_bytes_that_are_not_contiguous_are_refused() -> None:
    data: Any = np.frombuffer(data_of(64), np.uint8)
    for view in (data[::2], memoryview(data)[::2], data.reshape(8, 8).T):
        with pytest.raises(ValueError, match="contiguous"):
            checksum(view)


@given(st.integers(1, 300), st.integers(0, MASK), st.data())
def test_any_change_within_a_word_is_detected(size: int, seed: int, data: st.DataObject) -> None:
    one = bytearray(data_of(size, seed))
    before = checksum(one, seed)
    start = 4 * data.draw(st.integers(0, (size - 1) // 4))
    change = data.draw(st.binary(min_size=len(one[start : start + 4]), max_size=len(one[start : start + 4])))
    changed = one[start : start + 4] != change
    one[start : start + 4] = change
    assert (checksum(one, seed) != before) is changed


def test_every_flipped_bit_is_detected() -> None:
    data = bytearray(data_of(1203))
    seen = {checksum(data)}
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << (bit % 8)
        seen.add(checksum(data))
        data[bit // 8] ^= 1 << (bit % 8)
    assert len(seen) == 1 + 8 * len(data), "two flips look alike, or one like none"


@given(st.integers(2, 200), st.data())
def test_swapped_words_are_detected(words: int, data: st.DataObject) -> None:
    """Also words that differ by a power of two only, the worst case for the weights."""
    values = data.draw(
        st.lists(st.sampled_from([0, 1, 1 << 31, 0xFFFFFFFF, 7, 7 + (1 << 31)]), min_size=words, max_size=words)
    )
    i, j = data.draw(st.tuples(st.integers(0, words - 1), st.integers(0, words - 1)))
    before = checksum(np.array(values, "<u4").tobytes())
    swapped = values != (values := _swapped(values, i, j))
    assert (checksum(np.array(values, "<u4").tobytes()) != before) is swapped


def test_swapped_words_far_apart_are_detected() -> None:
    words = np.zeros(1 << 21, "<u4")
    words[0], words[1 << 20] = 1 << 31, 0
    before = checksum(words.view(np.uint8))
    words[0], words[1 << 20] = 0, 1 << 31
    assert checksum(words.view(np.uint8)) != before


@given(st.binary(min_size=1, max_size=200), st.integers(1, 40))
def test_missing_and_added_zeros_are_detected(data: bytes, zeros: int) -> None:
    assert checksum(data + bytes(zeros)) != checksum(data)
    assert checksum(bytes(zeros) + data) != checksum(data)


@given(st.binary(max_size=100), st.integers(0, MASK), st.integers(0, MASK))
def test_another_seed_gives_another_checksum(data: bytes, one: int, other: int) -> None:
    assert (checksum(data, one) == checksum(data, other)) is (one == other)


def test_swapped_halves_are_detected() -> None:
    """Pages of a torn or misplaced read."""
    for size in (64, 256, 4096, 65_536):
        data = data_of(2 * size)
        assert checksum(data) != checksum(data[size:] + data[:size])


@pytest.mark.usefixtures("fresh_native")
def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = checksum(data_of(1003), 5)
    native.load.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert native.load() is None
    assert checksum(data_of(1003), 5) == expected
    with pytest.raises(ValueError, match="contiguous"):
        checksum(np.zeros(64, np.uint8)[::2])


@pytest.mark.usefixtures("fresh_native")
def test_the_kernel_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.load() is not None
    (built,) = (tmp_path / "zipserve/kernels").iterdir()
    native.load.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    library = native.load()
    assert library is not None
    assert library._name == str(built)
    sums = (ctypes.c_uint64 * 2)()
    library.zs_checksum(ctypes.c_char_p(b"\1\0\0\0\2\0\0\0"), ctypes.c_uint64(8), sums)
    assert list(sums) == [3, 2]


@pytest.mark.usefixtures("fresh_native")
def test_a_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    with pytest.raises(subprocess.CalledProcessError):
        native.load()
    assert list((tmp_path / "zipserve/kernels").iterdir()) == []


def _swapped(values: list[int], i: int, j: int) -> list[int]:
    values = [*values]
    values[i], values[j] = values[j], values[i]
    return values
