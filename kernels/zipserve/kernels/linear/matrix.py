"""Weights of a linear layer, packed for the CPU kernel: panels of 16 outputs, [panel][input][16]."""

from dataclasses import dataclass

import torch

from zipserve.kernels import memory

PANEL = 16
PAIR = 2 * PANEL
STORAGES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""How weights may be stored. The kernel computes in float32 whatever it is."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """[outputs, inputs] weights, and what is added to each output."""

    panels: torch.Tensor
    """[panels, inputs, 16], an even number of panels; outputs beyond the last are zeros."""
    scales: torch.Tensor | None
    """float32 [16 * panels], of int8 weights."""
    bias: torch.Tensor | None
    """float32 [16 * panels]"""
    inputs: int
    outputs: int

    @property
    def size_bytes(self) -> int:
        """Memory that the weights take."""
        return self.panels.nbytes

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, as an embedding looks them up: int64 [n] -> float32 [n, inputs]."""
        found = self.panels[outputs // PANEL, :, outputs % PANEL].float()
        return found if self.scales is None else found * self.scales[outputs, None]

    def unpack(self) -> torch.Tensor:
        """The weights as float32 [outputs, inputs]."""
        weights = self.panels.float().transpose(1, 2).reshape(-1, self.inputs)
        return (weights if self.scales is None else weights * self.scales[:, None])[: self.outputs]


def pack(weight: torch.Tensor, storage: torch.dtype, bias: torch.Tensor | None = None) -> PackedMatrix:
    """Packs the weights of a linear layer.

    Args:
        weight: floating [outputs, inputs].
        storage: one of STORAGES. int8 rounds, with one scale per output; the others round only what they cannot hold.
        bias: [outputs].

    Raises:
        ValueError: the storage is none of these, or the shapes do not fit.
    """
    if storage not in STORAGES:
        raise ValueError(f"weights are stored as one of {', '.join(map(str, STORAGES))}, not {storage}")
    if weight.dim() != 2 or 0 in weight.shape or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"weights of shape {list(weight.shape)} and bias {None if bias is None else list(bias.shape)}")
    outputs, inputs = weight.shape
    padded = -(-outputs // PAIR) * PAIR
    panels = memory.allocate(padded * inputs * storage.itemsize).view(storage).view(-1, inputs, PANEL)
    scales = None
    if storage is torch.int8:
        of_outputs = weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        scales = _padded(of_outputs, padded)
        weight = (weight.float() / of_outputs[:, None]).round()
    whole = outputs // PANEL * PANEL
    panels[: whole // PANEL] = torch.unflatten(weight[:whole], 0, (-1, PANEL)).transpose(1, 2)
    if whole < outputs:
        panels[whole // PANEL, :, : outputs - whole] = weight[whole:].T
    return PackedMatrix(panels, scales, None if bias is None else _padded(bias, padded), inputs, outputs)


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Weights of gates and factors such that each pair of panels holds both of the same 16 columns.

    Args:
        gate: [columns, inputs].
        up: [columns, inputs].

    Returns:
        [2 * columns padded to a multiple of 16, inputs]
    """
    columns = -(-gate.shape[0] // PANEL) * PANEL
    both = gate.new_zeros(columns // PANEL, 2, PANEL, gate.shape[1])
    for part, weights in enumerate((gate, up)):
        padded = torch.nn.functional.pad(weights, (0, 0, 0, columns - weights.shape[0]))
        both[:, part] = torch.unflatten(padded, 0, (-1, PANEL))
    return both.flatten(0, 2)


def _padded(numbers: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(numbers.detach().float(), (0, count - numbers.numel()))
