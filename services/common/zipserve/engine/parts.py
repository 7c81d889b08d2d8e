"""Parts of a module that one native call computes: RMS norms, and MLPs whose hidden columns have gates.

Neither names nor classes tell them, but what they do to random numbers; so they are found in any family.
"""

from typing import Any

import torch
from torch import nn

from zipserve.engine.fused.recognition import ACTIVATIONS, Norm, NotRecognizedError, norm_of
from zipserve.engine.packing import take_down, take_gates
from zipserve.kernels.decoder import Activation, Linear, Program, Workspace
from zipserve.kernels.norm import rms_norm

TOLERANCE, TOLERANCE_HALF = 1e-4, 2e-2
"""Greatest norm of a recognized MLP's error by the norm of what it computes, in float32 and in half precision."""
BUFFERS = ("rows", "gated", "out")


class RmsNorm(nn.Module):
    """An RMS norm."""

    def __init__(self, norm: Norm, weight: nn.Parameter) -> None:
        super().__init__()
        self._factors, self._eps = norm.weight, norm.eps
        self.weight = weight  # some families ask a norm for its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> likewise."""
        return rms_norm(x, self._factors, self._eps)

    __call__ = forward  # it has no hooks, and is called often


class Room:
    """The buffers of MLPs of equal widths, which run one after another."""

    def __init__(self, inputs: int, hidden: int) -> None:
        self._inputs, self._hidden = inputs, hidden
        self._size = 0, 0
        self._workspace: Workspace

    def workspace(self, rows: torch.Tensor, out: torch.Tensor) -> Workspace:
        """Over [rows, inputs] and an output of this shape. It is kept: most steps have as many rows as the last one."""
        size = len(rows), torch.get_num_threads()
        if size != self._size:
            gated = torch.empty(len(rows), self._hidden)
            buffers = dict(zip(BUFFERS, (rows, gated, out), strict=True))
            self._workspace = Workspace(buffers, [], max(self._inputs, self._hidden))
            self._size = size
        self._workspace.bind("rows", rows)
        self._workspace.bind("out", out)
        return self._workspace


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), as one program."""

    def __init__(self, program: Program, room: Room) -> None:
        super().__init__()
        self._program, self._room = program, room

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> likewise."""
        rows = x.float().contiguous()
        out = torch.empty_like(rows)
        columns = rows.shape[-1]
        self._program.run(self._room.workspace(rows.view(-1, columns), out.view(-1, columns)))
        return out.to(x.dtype)

    __call__ = forward


def replace_parts(module: Any, storage: torch.dtype) -> None:
    """Replaces what is recognized in `module`; MLPs give up their weights.

    Args:
        storage: see zipserve.kernels.linear.pack.
    """
    rooms: dict[tuple[int, int], Room] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            replaced = _rms_norm(child) or _gated_mlp(child, storage, rooms)
            if replaced is not None:
                setattr(parent, name, replaced)


def _rms_norm(part: Any) -> RmsNorm | None:
    try:
        return RmsNorm(norm_of(part), part.weight)
    except NotRecognizedError:
        return None


def _gated_mlp(part: nn.Module, storage: torch.dtype, rooms: dict[tuple[int, int], Room]) -> GatedMlp | None:
    linears = [layer for layer in part.children() if type(layer) is nn.Linear]
    gates, down = linears[:-1], linears[-1] if linears else None
    if down is None or not _is_shaped_like_one(part, gates, down):
        return None
    for of_part in (gates, gates[::-1]):
        for activation in ACTIVATIONS:
            if _computes(part, of_part, activation, down):
                matrix = take_gates(of_part, storage)
                hidden = matrix.outputs // 2
                operations = [
                    Linear(matrix, "rows", "gated", gated=activation),
                    Linear(take_down(down, hidden, storage), "gated", "out"),
                ]
                room = rooms.setdefault((matrix.inputs, hidden), Room(matrix.inputs, hidden))
                return GatedMlp(Program(operations, BUFFERS), room)
    return None


def _is_shaped_like_one(part: nn.Module, gates: list[nn.Linear], down: nn.Linear) -> bool:
    """Nothing but one or two layers of gates and factors, and the one that takes their products."""
    return (
        len(gates) in (1, 2)
        and {layer.in_features for layer in gates} == {down.out_features}
        and {layer.out_features for layer in gates} == {2 * down.in_features // len(gates)}
        and {id(of_part) for of_part in part.parameters()}
        == {id(of_layer) for layer in (*gates, down) for of_layer in layer.parameters()}
    )


@torch.no_grad()
def _computes(part: nn.Module, gates: list[nn.Linear], activation: Activation, down: nn.Linear) -> bool:
    """Whether that is what the part does to random rows."""
    x = torch.randn(1, 2, down.out_features, generator=torch.Generator().manual_seed(0)).to(down.weight.dtype)
    try:
        wanted = part(x)
    except Exception:  # noqa: BLE001  whatever it wants to be called with, it is no MLP
        return False
    both = torch.cat([layer(x) for layer in gates], -1)
    gate, up = both.chunk(2, -1)
    found = down(ACTIVATIONS[activation](gate) * up)
    tolerance = TOLERANCE if x.dtype is torch.float32 else TOLERANCE_HALF
    return wanted.shape == found.shape and bool((found - wanted).norm() <= tolerance * wanted.norm())
