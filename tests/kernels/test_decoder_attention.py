"""Programs that attend: all layers of a decode step as one native call, against their operations one by one."""

from dataclasses import dataclass

import pytest
import torch

from zipserve.kernels import native
from zipserve.kernels.attention import DecodeStep, OpenBlocks, RawFormat, SealedBlocks
from zipserve.kernels.decoder import (
    Attend,
    Attentions,
    LayerAttention,
    Layers,
    Linear,
    Operation,
    Program,
    Workspace,
    run_reference,
)
from zipserve.kernels.linear import pack

KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, SIZE = 2, 3, 16, 24, 16
LAYERS, SLABS, SLOTS = 3, 7, 9
HIDDEN, HEADS = 32, KV_HEADS * GROUP
WIDTH = (HEADS + KV_HEADS) * KEY_DIM + KV_HEADS * VALUE_DIM
NAMES = ("hidden", "heads", "attended")
ATTENDS = ("heads", "attended")
TABLE = [[0, 0, 0], [5, 0, 0], [2, 6, 1]]
TOLERANCE = 2e-5


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(*of: int) -> torch.Tensor:
    return torch.tensor(of, dtype=torch.int32)


@dataclass
class Cache:
    """KV of three rows: with no sealed block, one and several."""

    data: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @staticmethod
    def filled() -> "Cache":
        form = RawFormat(KV_HEADS, KEY_DIM, VALUE_DIM, SIZE, torch.float32)
        data = numbers(SLABS, LAYERS, form.layer_bytes // 4).view(torch.uint8)
        shape = (LAYERS, SLOTS, KV_HEADS, SIZE)
        return Cache(data, numbers(*shape, KEY_DIM, seed=1), numbers(*shape, VALUE_DIM, seed=2))

    def step(self, first: torch.Tensor, table: list[list[int]]) -> DecodeStep:
        form = RawFormat(KV_HEADS, KEY_DIM, VALUE_DIM, SIZE, torch.float32)
        zeros = int32(0, 0, 0)
        no_sinks = torch.empty(SLABS, LAYERS, 0, dtype=torch.uint8)
        sealed = SealedBlocks(form, self.data, torch.tensor(table).int(), int32(0, 1, 3), zeros, no_sinks, zeros)
        opened = OpenBlocks(self.keys, self.values, int32(4, 0, 7), int32(1, SIZE, 5))
        return DecodeStep(sealed, opened, first)

    def attentions(self, weights: torch.Tensor) -> Attentions:
        """Two layers that see everything, and between them one with a window, a softcap and sinks."""
        everything, window = self.step(int32(0, 0, 0), TABLE), self.step(int32(0, 9, 30), TABLE)
        sinks = numbers(HEADS, seed=3).double()
        layers = [LayerAttention(0, 0.25), LayerAttention(1, 0.3, 2.0, sinks), LayerAttention(0, 0.25)]
        return Attentions(Layers(layers), [everything, window], weights)

    def plain(self, table: list[list[int]]) -> Attentions:
        """Every layer sees everything."""
        return Attentions(Layers([LayerAttention(0, 0.25)] * LAYERS), [self.step(int32(0, 0, 0), table)])


def operations() -> list[Operation]:
    found: list[Operation] = []
    for layer in range(LAYERS):
        found += [
            Linear(pack(0.2 * numbers(WIDTH, HIDDEN, seed=layer), torch.float32), "hidden", "heads"),
            Attend("heads", "attended", layer),
            Linear(pack(numbers(HIDDEN, HEADS * VALUE_DIM, seed=9), torch.float32), "attended", "hidden", adds=True),
        ]
    return found


def buffers() -> dict[str, torch.Tensor]:
    columns = {"hidden": HIDDEN, "heads": WIDTH, "attended": HEADS * VALUE_DIM}
    return {name: numbers(3, width, seed=4) for name, width in columns.items()}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equals_operations_one_by_one(threads: int) -> None:
    assert native.load() is not None
    torch.set_num_threads(threads)  # the fixture sets it back
    ways: list[tuple[dict[str, torch.Tensor], Cache, torch.Tensor]] = [
        (buffers(), Cache.filled(), torch.full((LAYERS, 3, SIZE), torch.nan)) for _ in range(2)
    ]
    (found, found_cache, found_weights), (wanted, wanted_cache, wanted_weights) = ways
    attentions = found_cache.attentions(found_weights)
    Program(operations(), NAMES).run(Workspace(found, [], HEADS * VALUE_DIM, attentions, ATTENDS))
    run_reference(operations(), wanted, [], wanted_cache.attentions(wanted_weights))
    for name in NAMES:
        assert (found[name] - wanted[name]).norm() <= TOLERANCE * wanted[name].norm(), name
    for ours, theirs in ((found_cache.keys, wanted_cache.keys), (found_cache.values, wanted_cache.values)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert not torch.equal(ours, Cache.filled().keys), "the new tokens were written"
    torch.testing.assert_close(found_weights, wanted_weights, rtol=0, atol=1e-5)


def test_a_slab_that_does_not_exist_is_found_before_anything_is_written() -> None:
    cache, of = Cache.filled(), buffers()
    attentions = cache.plain([[0, 0, 0], [5, 0, 0], [2, SLABS, 1]])
    with pytest.raises(IndexError, match="row 2 refers to a slab"):
        Program(operations(), NAMES).run(Workspace(of, [], HEADS * VALUE_DIM, attentions, ATTENDS))
    assert torch.equal(cache.keys, Cache.filled().keys)
    assert torch.equal(of["hidden"], buffers()["hidden"])


@pytest.mark.parametrize("width", [WIDTH + 1, KV_HEADS * VALUE_DIM])
def test_refuses_rows_that_do_not_hold_the_heads(width: int) -> None:
    of = buffers() | {"heads": numbers(3, width)}
    with pytest.raises(ValueError, match="do not hold heads"):
        Workspace(of, [], HEADS * VALUE_DIM, Cache.filled().plain(TABLE), ATTENDS)


def test_refuses_room_for_other_heads() -> None:
    of = buffers() | {"attended": numbers(3, HEADS * VALUE_DIM - 1)}
    with pytest.raises(ValueError, match="6 x 24 columns"):
        Workspace(of, [], HEADS * VALUE_DIM, Cache.filled().plain(TABLE), ATTENDS)


def test_refuses_weights_and_sinks_of_other_shapes_and_steps_that_are_not_there() -> None:
    step = Cache.filled().step(int32(0, 0, 0), TABLE)
    for how, weights, message in (
        (LayerAttention(0, 0.25), torch.empty(1, 3, SIZE + 1), "weights must be"),
        (LayerAttention(0, 0.25), torch.empty(2, 3, SIZE), "weights must be"),
        (LayerAttention(0, 0.25, sink_logits=torch.empty(HEADS + 1)), None, "sink logits must be"),
        (LayerAttention(1, 0.25), None, "there are 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Workspace(buffers(), [], HEADS * VALUE_DIM, Attentions(Layers([how]), [step], weights), ATTENDS)
