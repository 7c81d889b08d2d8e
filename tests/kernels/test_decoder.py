"""Programs of a decoder layer: one native call against the reference."""

import pytest
import torch

from zipserve.kernels.decoder import Activation, Heads, Linear, NormAdd, Operation, Program, Workspace, run_reference
from zipserve.kernels.linear import interleave, pack

TOLERANCE = 2e-5
HIDDEN, GATED, HEADS, KV_HEADS, DIM = 96, 208, 6, 2, 16
NAMES = ("hidden", "heads", "attended", "gated", "normal")
_generator = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator)


def buffers(rows: int) -> dict[str, torch.Tensor]:
    columns = (HIDDEN, (HEADS + 2 * KV_HEADS) * DIM, HEADS * DIM, GATED, HIDDEN)
    return {name: numbers(rows, width) for name, width in zip(NAMES, columns, strict=True)}


def layer(activation: Activation) -> list[Operation]:
    """A layer with everything that a program knows."""
    projections = pack(
        numbers((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), torch.float32, numbers((HEADS + 2 * KV_HEADS) * DIM)
    )
    gates = pack(interleave(numbers(200, HIDDEN), numbers(200, HIDDEN)), torch.bfloat16)
    return [
        Linear(projections, "hidden", "heads", numbers(HIDDEN), 1e-5),
        Heads("heads", HEADS, KV_HEADS, DIM, 1, numbers(DIM), numbers(DIM), 1e-6),
        Linear(pack(numbers(HIDDEN, HEADS * DIM), torch.float32), "attended", "hidden", adds=True),
        Linear(pack(numbers(HIDDEN, HEADS * DIM), torch.float16), "attended", "normal"),
        NormAdd("normal", "hidden", numbers(HIDDEN), 1e-6),
        Linear(gates, "hidden", "gated", numbers(HIDDEN), 1e-6, gated=activation),
        Linear(pack(numbers(HIDDEN, GATED), torch.int8), "gated", "hidden", adds=True),
    ]


def assert_equal(
    operations: list[Operation],
    of: dict[str, torch.Tensor],
    ropes: list[tuple[torch.Tensor, torch.Tensor]],
    inputs_max: int = GATED,
) -> None:
    """Runs both ways on copies."""
    found, wanted = ({name: rows.clone() for name, rows in of.items()} for _ in range(2))
    Program(operations, NAMES).run(Workspace(found, ropes, inputs_max))
    run_reference(operations, wanted, ropes)
    for name in NAMES:
        assert (found[name] - wanted[name]).norm() <= TOLERANCE * wanted[name].norm(), name


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 30, 130])
def test_equals_the_reference(rows: int, activation: Activation) -> None:
    ropes = [(numbers(rows, width), numbers(rows, width)) for width in (DIM, 8)]
    assert_equal(layer(activation), buffers(rows), ropes)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_wait_for_each_other(threads: int) -> None:
    """More rows than a thread, fewer than threads, and parts that need what others have written."""
    torch.set_num_threads(threads)  # the fixture sets it back
    for rows in (1, 2, 50, 200):
        ropes = [(numbers(rows, DIM), numbers(rows, DIM))] * 2
        assert_equal(layer(Activation.SILU), buffers(rows), ropes)


def test_heads_without_norm_or_rope_stay() -> None:
    of = buffers(3)
    before = of["heads"].clone()
    Program([Heads("heads", HEADS, KV_HEADS, DIM, None)], NAMES).run(Workspace(of, [], GATED))
    assert torch.equal(of["heads"], before)


def test_rows_may_be_wider_than_what_is_used() -> None:
    of = buffers(5)
    of["attended"] = numbers(5, HEADS * DIM + 7)[:, : HEADS * DIM]
    operations: list[Operation] = [Linear(pack(numbers(HIDDEN, HEADS * DIM), torch.float32), "attended", "hidden")]
    assert_equal(operations, of, [])


def test_buffers_can_be_exchanged() -> None:
    matrix = pack(numbers(HIDDEN, HEADS * DIM), torch.float32)
    of, other = buffers(2), numbers(2, HEADS * DIM)
    workspace = Workspace(of, [], GATED)
    workspace.bind("attended", other)
    Program([Linear(matrix, "attended", "hidden")], NAMES).run(workspace)
    assert torch.allclose(of["hidden"], other @ matrix.unpack().T, atol=1e-4)


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    of = buffers(14)
    of["hidden"][3, 5] = torch.nan
    ropes = [(numbers(14, DIM), numbers(14, DIM))] * 2
    Program(layer(Activation.SILU), NAMES).run(Workspace(of, ropes, GATED))
    assert [bool(row.isfinite().all()) for row in of["hidden"]] == [row != 3 for row in range(14)]


def test_refuses_other_numbers() -> None:
    with pytest.raises(ValueError, match="float32"):
        Workspace({"hidden": torch.zeros(2, 3, dtype=torch.float64)}, [], 3)
    with pytest.raises(ValueError, match="contiguous rows"):
        Workspace({"hidden": torch.zeros(3, 2).T}, [], 3)
