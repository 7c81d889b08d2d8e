"""The parts of a decoder layer around its attention, fused: norms, products, rotary embedding, gated activation.

A program is a list of operations over named buffers of rows. On the CPU one call runs all of it, without a return to
Python or a thread's wake-up between operations.
"""

from zipserve.kernels.decoder.operations import Activation, Heads, Linear, NormAdd, Operation
from zipserve.kernels.decoder.program import Program, Workspace
from zipserve.kernels.decoder.reference import run_reference

__all__ = ["Activation", "Heads", "Linear", "NormAdd", "Operation", "Program", "Workspace", "run_reference"]
