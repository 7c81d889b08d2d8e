"""Products with packed matrices: the kernel against the reference, for every storage and number of rows."""

import errno
import mmap

import pytest
import torch

from zipserve.kernels import memory
from zipserve.kernels.linear import Products, interleave, linear, linear_reference, pack
from zipserve.kernels.linear.matrix import PANEL, STORAGES

TOLERANCE = 2e-5
"""Greatest error by the spread of the outputs: of sums of up to 3,000 products of float32."""
SHAPES = [(1, 1), (16, 5), (33, 48), (64, 576), (200, 130), (7, 3000)]
ROWS = [1, 2, 3, 4, 6, 7, 11, 12, 13, 18, 23, 24, 25, 26, 37, 49, 130]
"""Around the borders of tiles and strips of every CPU."""


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(storage: torch.dtype, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    matrix = pack(numbers(outputs, inputs), storage, numbers(outputs, seed=1))
    for rows in ROWS:
        x = numbers(rows, inputs, seed=rows)
        found, wanted = linear(x, matrix), linear_reference(x, matrix)
        spread = inputs**0.5
        assert (found - wanted).abs().max() <= TOLERANCE * spread, rows


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_outputs(threads: int) -> None:
    matrix, x = pack(numbers(700, 300), torch.float32), numbers(30, 300, seed=1)
    alone = linear(x, matrix)
    torch.set_num_threads(threads)  # the fixture sets it back
    assert torch.equal(linear(x, matrix), alone)


@pytest.mark.parametrize("rows", [1, 5, 13, 130])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_matrices_share_their_rows(rows: int, threads: int) -> None:
    storages = (torch.float32, torch.bfloat16, torch.int8)
    matrices = [
        pack(numbers(outputs, 576, seed=outputs), storage, numbers(outputs))
        for outputs, storage in zip((700, 33, 1), storages, strict=True)
    ]
    x = numbers(rows, 576)
    alone = [linear(x, matrix) for matrix in matrices]
    torch.set_num_threads(threads)  # the fixture sets it back
    for found, wanted in zip(Products(matrices)(x), alone, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_stores_what_it_can_hold_exactly(storage: torch.dtype) -> None:
    weight = numbers(37, 21).to(storage)
    matrix = pack(weight, storage)
    assert torch.equal(matrix.unpack(), weight.float())
    assert torch.equal(matrix.rows(torch.tensor([36, 0, 17])), weight[[36, 0, 17]].float())
    assert matrix.size_bytes == 64 * 21 * storage.itemsize


def test_special_float16_weights() -> None:
    """Every finite half, subnormal ones included, and what is no number stays none."""
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = halves[halves.isfinite()].view(-1, 1)
    assert torch.equal(linear(torch.ones(1, 1), pack(finite, torch.float16))[0], finite[:, 0].float())
    special = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]])
    found = linear(torch.ones(1, 1), pack(special, torch.float16))[0]
    assert found[0] == torch.inf
    assert found[1] == -torch.inf
    assert found[2].isnan()


def test_int8_rounds_by_half_a_step_at_most() -> None:
    weight = numbers(40, 100)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((pack(weight, torch.int8).unpack() - weight).abs() <= steps * 0.5001).all()
    assert torch.equal(pack(torch.zeros(3, 4), torch.int8).unpack(), torch.zeros(3, 4))


def test_packing_what_was_packed_changes_nothing() -> None:
    once = pack(numbers(40, 100), torch.int8).unpack()
    assert torch.equal(pack(once, torch.int8).unpack(), once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype_and_shape_of_its_rows(dtype: torch.dtype) -> None:
    matrix = pack(numbers(9, 8), torch.float32)
    x = numbers(2, 3, 8).to(dtype)
    found = linear(x, matrix)
    assert found.dtype is dtype
    assert torch.equal(found, linear(x.float().view(6, 8), matrix).to(dtype).view(2, 3, 9))


def test_no_rows() -> None:
    assert linear(torch.zeros(0, 8), pack(numbers(9, 8), torch.float32)).shape == (0, 9)


def test_rows_that_are_not_finite_stay_so() -> None:
    x = torch.ones(5, 64)
    x[1, 3], x[2, 60] = torch.nan, torch.inf
    found = linear(x, pack(numbers(40, 64), torch.float32))
    assert [bool(row.isfinite().all()) for row in found] == [True, False, False, True, True]


def test_interleaves_gates_and_factors() -> None:
    gate, up = numbers(37, 8), numbers(37, 8, seed=1)
    both = torch.unflatten(interleave(gate, up), 0, (-1, 2, PANEL))
    assert torch.equal(both[:, 0].flatten(0, 1)[:37], gate)
    assert torch.equal(both[:, 1].flatten(0, 1)[:37], up)
    assert not both[:, :].flatten(0, 2)[-11:].any()


@pytest.mark.parametrize(
    ("weight", "storage", "bias"),
    [
        (torch.zeros(3), torch.float32, None),
        (torch.zeros(0, 3), torch.float32, None),
        (torch.zeros(3, 3), torch.float64, None),
        (torch.zeros(3, 3), torch.float32, torch.zeros(4)),
    ],
)
def test_refuses(weight: torch.Tensor, storage: torch.dtype, bias: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="weights"):
        pack(weight, storage, bias)


def test_refuses_rows_of_another_width() -> None:
    with pytest.raises(ValueError, match="rows of 9 numbers for a matrix of 8 inputs"):
        linear(torch.zeros(1, 9), pack(numbers(9, 8), torch.float32))


def test_refuses_matrices_of_different_inputs() -> None:
    with pytest.raises(ValueError, match=r"matrices of \[8, 9\] inputs"):
        Products([pack(numbers(4, inputs), torch.float32) for inputs in (9, 8)])


def test_memory_is_zeroed_and_begins_at_a_page() -> None:
    for size_bytes in (1, 1 << 12, (1 << 21) + 3, (1 << 23) + 1, 1 << 26):
        octets = memory.allocate(size_bytes)
        assert octets.numel() == size_bytes
        assert octets.data_ptr() % mmap.PAGESIZE == 0
        assert not octets.any()


def test_pieces_of_memory_do_not_overlap() -> None:
    """More than one chunk of them, each written as a whole."""
    pieces = [memory.allocate(3_000_001).fill_(number) for number in range(30)]
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))


def test_memory_of_inference_mode_is_no_other_memory() -> None:
    """Its pieces share a mapping with those that are written outside of it."""
    with torch.inference_mode():
        memory.allocate(1)
        piece = memory.allocate(1 << 24)
    piece.fill_(1)
    memory.allocate(1).fill_(1)


def test_memory_where_the_kernel_has_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("mmap.mmap", Memory)
    assert not memory.allocate(1 << 24).any()
