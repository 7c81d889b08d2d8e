"""Programs, and what they work on."""

import ctypes
from collections.abc import Mapping, Sequence

import torch

from zipserve.kernels import native
from zipserve.kernels.attention.cpu import raise_wrong
from zipserve.kernels.decoder.attentions import Attentions
from zipserve.kernels.decoder.operations import Activation, Attend, Heads, Linear, Operation
from zipserve.kernels.decoder.reference import run_reference
from zipserve.kernels.linear.cpu import structure_of

_STORE, _ADD = 0, 1
_GATED = {Activation.SILU: 2, Activation.GELU_TANH: 3}


class _Op(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "source", "target", "epilogue", "index")),
        *((name, ctypes.c_int32) for name in ("query_heads", "key_heads", "dim")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("matrix", "norm", "key_norm")),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


class _Rope(ctypes.Structure):
    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("dim", ctypes.c_int64))


class _Program(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ops", "buffers", "ropes", "layers", "steps", "weights")),
        *((name, ctypes.c_void_p) for name in ("packed", "scratch")),
        ("scratch_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("count", "rows", "threads", "step_count")),
    )


class Workspace:
    """The buffers of one step, all with one row per token, and the memory that programs need besides."""

    def __init__(
        self,
        buffers: Mapping[str, torch.Tensor],
        ropes: Sequence[tuple[torch.Tensor, torch.Tensor]],
        inputs_max: int,
        attentions: Attentions | None = None,
        attends: tuple[str, str] = ("", ""),
    ) -> None:
        """
        Args:
            buffers: float32 [rows, columns] each, contiguous rows; their order is that of the programs' names.
            ropes: cosines and sines, float32 [rows, width] each, contiguous.
            inputs_max: most inputs of any matrix of the programs.
            attentions: for programs that attend.
            attends: the buffer with their queries, keys and values, and the one for what they find.

        Raises:
            ValueError: a buffer does not hold what the attentions need.
        """
        self.buffers, self.ropes, self.attentions = dict(buffers), list(ropes), attentions
        library = native.load()
        if library is None:
            return
        rows, threads = len(next(iter(buffers.values()))), torch.get_num_threads()
        stride = library.zs_decoder_scratch(ctypes.c_int64(inputs_max), rows)
        self._memory = torch.empty(rows * inputs_max + threads * stride)
        self._buffers = (_Buffer * len(buffers))(*map(_buffer, buffers.values()))
        self._ropes = (_Rope * len(ropes))(*(_Rope(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in ropes))
        packed = self._memory.data_ptr()
        scratch = packed + 4 * rows * inputs_max
        self.structure = _Program(
            *(0, ctypes.addressof(self._buffers), ctypes.addressof(self._ropes), None, None, None),
            *(packed, scratch, stride, 0, rows, threads, 0),
        )
        if attentions is not None:
            self._attend(attentions, *(self.buffers[name] for name in attends))

    def _attend(self, attentions: Attentions, rows: torch.Tensor, attended: torch.Tensor) -> None:
        calls = attentions.calls(rows, attended)
        self._steps = (ctypes.c_void_p * len(calls))(*(ctypes.addressof(call.arguments) for call in calls))
        structure = self.structure
        structure.layers = ctypes.addressof(attentions.layers.structures)
        structure.steps, structure.step_count = ctypes.addressof(self._steps), len(calls)
        structure.weights = _pointer(attentions.weights)

    def bind(self, name: str, rows: torch.Tensor) -> None:
        """Puts other rows in the place of a buffer's."""
        self.buffers[name] = rows
        if native.load() is not None:
            index = list(self.buffers).index(name)
            self._buffers[index] = _buffer(rows)


class Program:
    """Operations that are run together."""

    def __init__(self, operations: Sequence[Operation], buffers: Sequence[str]) -> None:
        """
        Args:
            buffers: names of the workspaces' buffers, in their order.
        """
        self.operations = tuple(operations)
        order = {name: index for index, name in enumerate(buffers)}
        self._ops = (_Op * len(operations))(*(_structure(op, order) for op in operations))

    def run(self, workspace: Workspace) -> None:
        """Runs the operations over the workspace's rows.

        Raises:
            IndexError: a row attends to a slab or slot that does not exist, or sees no key.
            MemoryError: there is none for attention.
        """
        library = native.load()
        if library is None:
            run_reference(self.operations, workspace.buffers, workspace.ropes, workspace.attentions)
            return
        structure = workspace.structure
        structure.ops, structure.count = ctypes.addressof(self._ops), len(self._ops)
        raise_wrong(library.zs_decoder(ctypes.byref(structure)), structure.rows)


def _buffer(rows: torch.Tensor) -> _Buffer:
    if rows.dtype is not torch.float32 or rows.stride(1) != 1:
        raise ValueError(f"a buffer needs contiguous rows of float32, not {rows.dtype} with strides {rows.stride()}")
    return _Buffer(rows.data_ptr(), rows.stride(0))


def _pointer(numbers: torch.Tensor | None) -> int | None:
    return None if numbers is None else numbers.data_ptr()


def _structure(op: Operation, order: Mapping[str, int]) -> _Op:
    target = order[op.target]
    if isinstance(op, Linear):
        epilogue = _GATED[op.gated] if op.gated else _ADD if op.adds else _STORE
        matrix = ctypes.addressof(structure_of(op.matrix))
        return _Op(0, order[op.source], target, epilogue, -1, 0, 0, 0, op.eps, matrix, _pointer(op.norm), None)
    if isinstance(op, Heads):
        rope = -1 if op.rope is None else op.rope
        sizes = (op.query_heads, op.key_heads, op.dim)
        return _Op(1, 0, target, 0, rope, *sizes, op.eps, None, _pointer(op.norm), _pointer(op.key_norm))
    if isinstance(op, Attend):
        return _Op(3, order[op.source], target, 0, op.layer)
    return _Op(2, order[op.source], target, 0, -1, 0, 0, len(op.norm), op.eps, None, _pointer(op.norm), None)
