"""Decoder layers, fused: norms, products, rotary embedding, gated activation, and attention of decode steps.

A program is a list of operations over named buffers of rows. On the CPU one call runs all of it, without a return to
Python or a thread's wake-up between operations.
"""

from zipserve.kernels.decoder.attentions import Attentions, LayerAttention, Layers
from zipserve.kernels.decoder.operations import Activation, Attend, Heads, Linear, NormAdd, Operation
from zipserve.kernels.decoder.program import Program, Workspace
from zipserve.kernels.decoder.reference import run_reference

__all__ = [
    "Activation",
    "Attend",
    "Attentions",
    "Heads",
    "LayerAttention",
    "Layers",
    "Linear",
    "NormAdd",
    "Operation",
    "Program",
    "Workspace",
    "run_reference",
]
