"""What the packed path computes together, in modules of any family: how it is found, and what is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import nn

from tiny_families import tiny
from zipserve.engine.loader import wrap
from zipserve.engine.packing import LINEARS, PackedLinear, pack_linears
from zipserve.engine.parts import GatedMlp, RmsNorm, replace_parts
from zipserve.engine.siblings import Siblings, find_siblings
from zipserve.kernels.linear import linear, pack


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mlp(nn.Module):
    """A gated MLP, its parts in an order and with names that no family has."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], bias: bool = False) -> None:
        super().__init__()
        self.factors, self.gates = (nn.Linear(24, 40, bias=bias) for _ in range(2))
        self.back = nn.Linear(40, 24, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.back(self.activation(self.gates(x)) * self.factors(x))
        return found


class Joined(nn.Module):
    """A gated MLP with one layer for gates and factors."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Linear(24, 80), nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates, factors = self.both(x).chunk(2, -1)
        found: torch.Tensor = self.back(F.silu(gates) * factors)
        return found


class CenteredNorm(nn.Module):
    """It has all that an RMS norm has, and computes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(24)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (24,), self.weight, eps=self.eps)


@pytest.mark.parametrize(
    "part",
    [Mlp(F.silu), Mlp(lambda x: F.gelu(x, approximate="tanh"), bias=True), Joined(), nn.RMSNorm(24, eps=1e-5)],
)
def test_parts_are_known_by_what_they_do(part: nn.Module) -> None:
    parent: Any = nn.ModuleDict({"part": part})
    inputs = [numbers(1, rows, 24, seed=rows) for rows in (1, 3, 70, 3)]
    with torch.no_grad():
        wanted = [part(x) for x in inputs]
    replace_parts(parent, torch.float32)
    assert isinstance(parent["part"], GatedMlp | RmsNorm)
    for x, expected in zip(inputs, wanted, strict=True):
        assert torch.allclose(parent["part"](x), expected, atol=1e-5)


@pytest.mark.parametrize("part", [Mlp(F.relu), Mlp(F.gelu), CenteredNorm(), nn.LayerNorm(24)])
def test_other_parts_stay(part: nn.Module) -> None:
    parent = nn.ModuleDict({"part": part})
    replace_parts(parent, torch.float32)
    assert parent["part"] is part


def test_replaced_parts_keep_half_precision() -> None:
    parent: Any = nn.ModuleDict({"mlp": Mlp(F.silu), "norm": nn.RMSNorm(24, eps=1e-5)}).bfloat16()
    x = numbers(1, 3, 24).bfloat16()
    with torch.no_grad():
        wanted = parent["mlp"](x), parent["norm"](x)
    replace_parts(parent, torch.bfloat16)
    for found, expected in zip((parent["mlp"](x), parent["norm"](x)), wanted, strict=True):
        assert found.dtype is torch.bfloat16
        assert (found - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize(
    ("family", "settings", "norms", "mlps"),
    [
        ("llama", {}, 9, 4),
        ("phi3", {}, 9, 4),
        ("qwen3", {}, 17, 4),
        ("granite", {}, 9, 4),
        ("olmo2", {}, 17, 4),
        ("glm4", {}, 17, 4),
        ("cohere", {}, 0, 4),
        ("gpt_neox", {}, 0, 0),
    ],
)
def test_finds_the_parts_of_a_family(family: str, settings: dict[str, Any], norms: int, mlps: int) -> None:
    module = tiny(family, **settings)
    replace_parts(module, torch.float32)
    parts = [type(part) for part in module.modules()]
    assert (parts.count(RmsNorm), parts.count(GatedMlp)) == (norms, mlps)


def test_finds_projections_of_the_same_rows() -> None:
    model = wrap(tiny("llama"), "tiny", "0")
    attention, mlp = (getattr(model.module.model.layers[0], name) for name in ("self_attn", "mlp"))
    groups = find_siblings(model, LINEARS)
    assert groups[:2] == [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [mlp.gate_proj, mlp.up_proj],
    ]
    assert len(groups) == 8


def test_rows_that_change_between_two_layers_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny("llama"), "tiny", "0")
    attention = model.module.model.layers[0].self_attn
    project = attention.k_proj.forward
    monkeypatch.setattr(attention.k_proj, "forward", lambda x: (project(x), x.mul_(2))[0])
    assert find_siblings(model, LINEARS)[0] == [attention.q_proj, attention.k_proj]


def test_a_layer_that_is_called_twice_has_no_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny("llama"), "tiny", "0")
    attention = model.module.model.layers[0].self_attn
    project = attention.k_proj.forward
    monkeypatch.setattr(attention.k_proj, "forward", lambda x: project(x) + 0 * attention.q_proj(x).sum())
    groups = find_siblings(model, LINEARS)
    assert all(attention.q_proj not in group for group in groups)


def test_siblings_take_their_part_whatever_is_called() -> None:
    matrices = [pack(numbers(outputs, 8, seed=outputs), torch.float32) for outputs in (5, 40)]
    siblings, x, other = Siblings(matrices), numbers(3, 8), numbers(3, 8, seed=1)
    for part, rows in ((0, x), (1, x), (1, x), (0, x), (0, other), (1, x), (0, other), (1, other)):
        assert torch.equal(siblings.take(part, rows), linear(rows, matrices[part]))


def test_siblings_compute_once() -> None:
    module = nn.ModuleDict({"first": nn.Linear(8, 5), "second": nn.Linear(8, 40)})
    packed: Any = Packable(module)
    layers = list(module.values())
    pack_linears(packed, torch.float32, [layers])
    first, second = (packed.parts[name] for name in ("first", "second"))
    assert isinstance(first, PackedLinear)
    x = numbers(3, 8)
    before = first(x).clone()
    x.zero_()  # which the second one must not see: its products exist
    assert torch.equal(second(x), linear(numbers(3, 8), second.matrix))
    assert torch.equal(before, linear(numbers(3, 8), first.matrix))


class Packable(nn.Module):
    """A module without embeddings."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def get_input_embeddings(self) -> None:
        """None"""

    def get_output_embeddings(self) -> None:
        """None"""
