"""A recognized decoder on the decoder kernel: packs its weights, and computes steps."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from zipserve.engine.attention import Scoring, in_hand
from zipserve.engine.fused.recognition import Decoder, Layer, Norm
from zipserve.engine.packing import bias_of, embedding_over, take, take_down, take_gates, take_weight
from zipserve.kernels.decoder import (
    Attend,
    Attentions,
    Heads,
    LayerAttention,
    Layers,
    Linear,
    NormAdd,
    Operation,
    Program,
    Workspace,
)
from zipserve.kernels.linear import PackedMatrix, pack

BUFFERS = ("hidden", "heads", "attended", "gated", "normal", "logits")


class FusedModel:
    """A decoder as programs: one before the first attention and one behind each; and one of all of them, which attends
    itself, for steps of decode.
    """

    def __init__(
        self, decoder: Decoder, heads: tuple[int, int, int, int], scorings: Sequence[Scoring], storage: torch.dtype
    ) -> None:
        """Takes the weights of the decoder's layers.

        Args:
            heads: query heads, KV heads, key_dim and value_dim.
            scorings: of each layer's attention.
            storage: of the weights, see zipserve.kernels.linear.pack.
        """
        self._heads, self._kv_heads, self._key_dim, self._value_dim = heads
        self._decoder = decoder
        self.scorings = tuple(scorings)
        is_tied = decoder.embedding.weight is decoder.head.weight
        head = take(decoder.head, storage)
        self._embedding: nn.Module = embedding_over(head, decoder.embedding) if is_tied else decoder.embedding
        operations: list[list[Operation]] = [[]]
        for layer in decoder.layers:
            operations[-1] += self._before(layer, storage)
            operations.append(self._behind(layer, storage))
        self._programs = [Program(part, BUFFERS) for part in operations]
        whole = list(operations[0])
        for index, part in enumerate(operations[1:]):
            whole += [Attend("heads", "attended", index), *part]
        self._whole = Program(whole, BUFFERS)
        self._head = Program([Linear(head, "hidden", "logits", decoder.norm.weight, decoder.norm.eps)], BUFFERS)
        self._vocab = head.outputs
        linears = [op for part in operations for op in part if isinstance(op, Linear)]
        self._columns = {op.target: op.columns for op in linears}
        self._columns |= {"normal": head.inputs, "attended": self._heads * self._value_dim}
        self._inputs_max = max(op.matrix.inputs for op in linears)

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See zipserve.engine.model.LoadedModel.logits."""
        hidden = self._embedding(token_ids)[0].float().contiguous()
        buffers = {name: hidden.new_empty(len(hidden), self._columns.get(name, 0)) for name in BUFFERS}
        buffers["hidden"] = hidden
        attentions = self._attentions()
        ropes = self._ropes(hidden, positions)
        workspace = Workspace(buffers, ropes, self._inputs_max, attentions, ("heads", "attended"))
        if attentions is None:
            self._run_by_layer(workspace)
        else:
            self._whole.run(workspace)
        return self._logits(hidden[rows])

    @property
    def scorings(self) -> tuple[Scoring, ...]:
        """Of each layer's attention."""
        return self._scorings

    @scorings.setter
    def scorings(self, scorings: Sequence[Scoring]) -> None:
        self._scorings = tuple(scorings)
        self._visibilities = list(dict.fromkeys(scoring.visibility for scoring in scorings))
        step_of = self._visibilities.index
        self._layers = Layers([LayerAttention(step_of(s.visibility), s.scale, s.softcap, s.sinks) for s in scorings])

    def _attentions(self) -> Attentions | None:
        """None: the layers attend one by one."""
        found = in_hand().steps(self._visibilities)
        return None if found is None else Attentions(self._layers, *found)

    def _run_by_layer(self, workspace: Workspace) -> None:
        query, key, value = self._split(workspace.buffers["heads"])
        attender = in_hand()
        for layer, scoring in enumerate(self.scorings):
            self._programs[layer].run(workspace)
            attended = attender.attend(layer, query, key, value, scoring)
            workspace.bind("attended", attended.float().flatten(1))
        self._programs[-1].run(workspace)

    def _ropes(self, hidden: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        tables = (self._decoder.rotary(hidden[None], positions, *kind) for kind in self._decoder.rope_kinds)
        return [(cos[0].float().contiguous(), sin[0].float().contiguous()) for cos, sin in tables]

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of a row of heads: queries, keys and values, [heads, tokens, dim] each."""
        widths = [self._heads * self._key_dim, self._kv_heads * self._key_dim, self._kv_heads * self._value_dim]
        query, key, value = torch.split(rows, widths, 1)
        return (
            torch.unflatten(query, 1, (self._heads, self._key_dim)).transpose(0, 1),
            torch.unflatten(key, 1, (self._kv_heads, self._key_dim)).transpose(0, 1),
            torch.unflatten(value, 1, (self._kv_heads, self._value_dim)).transpose(0, 1),
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        unused = hidden.new_empty(len(hidden), 0)
        logits = hidden.new_empty(len(hidden), self._vocab)
        buffers = dict.fromkeys(BUFFERS, unused) | {"hidden": hidden, "logits": logits}
        self._head.run(Workspace(buffers, [], hidden.shape[1]))
        softcap = self._decoder.softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def _before(self, layer: Layer, storage: torch.dtype) -> list[Operation]:
        matrix = _join(layer.projections, storage)
        heads = Heads("heads", self._heads, self._kv_heads, self._key_dim, layer.rope)
        if layer.query_norm and layer.key_norm:
            norm, key_norm = layer.query_norm, layer.key_norm
            heads = replace(heads, norm=norm.weight, key_norm=key_norm.weight, eps=norm.eps)
        return [
            Linear(matrix, "hidden", "heads", layer.input_norm.weight, layer.input_norm.eps),
            heads,
        ]

    @staticmethod
    def _behind(layer: Layer, storage: torch.dtype) -> list[Operation]:
        operations: list[Operation] = []

        def add(matrix: PackedMatrix, source: str, norm: Norm | None) -> None:
            """To the residual stream, normalized first or as it is."""
            if norm is None:
                operations.append(Linear(matrix, source, "hidden", adds=True))
            else:
                operations.append(Linear(matrix, source, "normal"))
                operations.append(NormAdd("normal", "hidden", norm.weight, norm.eps))

        add(take(layer.output, storage), "attended", layer.attention_norm)
        gates = take_gates(layer.gates, storage)
        norm = layer.mlp_norm
        operations.append(Linear(gates, "hidden", "gated", norm.weight, norm.eps, gated=layer.activation))
        add(take_down(layer.down, gates.outputs // 2, storage), "gated", layer.down_norm)
        return operations


def _join(layers: list[nn.Linear], storage: torch.dtype) -> PackedMatrix:
    """One matrix whose outputs are those of all layers, one after another."""
    bias = torch.cat([bias_of(layer) for layer in layers])
    return pack(torch.cat([take_weight(layer) for layer in layers]), storage, bias if bias.any() else None)
