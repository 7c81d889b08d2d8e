"""Blocks of KV in the zip format, among bytes that nobody may touch, and what the format allows their bytes to be."""

from dataclasses import dataclass, replace

import torch

from zipserve.kernels import rotation
from zipserve.kernels.dequantize.reference import unpack
from zipserve.kernels.saliency import classify
from zipserve.kernels.zipformat import SINK_TOKENS, VALUE_STEPS, WIDTH_MIN, Region, ZipFormat

BORDER = 1e-3
"""How far from a border between two cells, in cells, an encoder must know on which side of it a value is."""
GAP = 38
"""Bytes between two slabs, and in front of the first: no word is aligned, only float16 is."""


@dataclass(frozen=True)
class Blocks:
    """Arguments of `quantize`, of blocks whose slabs lie apart from one another."""

    form: ZipFormat
    keys: torch.Tensor
    values: torch.Tensor
    hi: torch.Tensor
    slabs: torch.Tensor
    sink_slabs: torch.Tensor

    @property
    def at_start(self) -> torch.Tensor:
        """bool [n]"""
        return self.sink_slabs >= 0

    def only(self, block: int) -> "Blocks":
        """One of the blocks, with the slabs that it has."""
        tensors = (self.keys, self.values, self.hi, self.slabs, self.sink_slabs)
        return Blocks(self.form, *(tensor[block : block + 1] for tensor in tensors))

    def float(self) -> "Blocks":
        """The same numbers in float32."""
        return replace(self, keys=self.keys.float(), values=self.values.float())


@dataclass(frozen=True)
class Slabs:
    """Memory for some layers of `layer_bytes`, with bytes around each."""

    memory: torch.Tensor
    layers: torch.Tensor
    """uint8 [slabs, layer_bytes], a view."""

    @staticmethod
    def filled(count: int, layer_bytes: int, fill: int) -> "Slabs":
        stride = layer_bytes + GAP
        memory = torch.full((GAP + count * stride,), fill, dtype=torch.uint8)
        return Slabs(memory, memory[GAP:].as_strided((count, layer_bytes), (stride, 1)))

    def untouched(self, fill: int, used: torch.Tensor) -> bool:
        """Whether all bytes are `fill`, apart from the layers `used`."""
        rest = self.memory.clone()
        rest[GAP:].as_strided(self.layers.shape, self.layers.stride())[used] = fill
        return bool((rest == fill).all())


def blocks_of(
    keys: torch.Tensor, values: torch.Tensor, form: ZipFormat, at_start: torch.Tensor, generator: torch.Generator
) -> Blocks:
    """With random classes, in random slabs of 2 n + 1."""
    count = len(keys)
    hi = classify(torch.rand(count, form.block_tokens, generator=generator), form, at_start)
    slabs, sink_slabs = (torch.randperm(2 * count + 1, generator=generator)[:count] for _ in range(2))
    return Blocks(form, keys, values, hi, slabs, torch.where(at_start, sink_slabs, -1))


def random_blocks(form: ZipFormat, at_start: list[bool], seed: int = 0, *, strided: bool = False) -> Blocks:
    """Normal numbers; `strided`, as an attention layer has them: token-major, a part of something wider."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(dim: int) -> torch.Tensor:
        if not strided:
            return torch.randn(len(at_start), form.kv_heads, form.block_tokens, dim, generator=generator)
        wide = torch.randn(len(at_start), form.block_tokens, form.kv_heads, 3 + dim + 2, generator=generator)
        return wide[..., 3:-2].transpose(1, 2)

    return blocks_of(
        numbers(form.key_dim), numbers(form.value_dim), form, torch.tensor(at_start, dtype=torch.bool), generator
    )


def assert_encoded(blocks: Blocks, layers: torch.Tensor, sinks: torch.Tensor) -> None:
    """Every parameter and code is one that exact arithmetic gives, within BORDER and the rounding of float32.

    Args:
        layers: uint8 [slabs, layer_bytes], as written for the blocks.
        sinks: uint8 [slabs, sinks_layer_bytes], likewise.
    """
    form = blocks.form
    for block in range(len(blocks.slabs)):
        data, hi = layers[blocks.slabs[block]].contiguous(), blocks.hi[block]
        bitmap = (data[: form.bitmap_bytes, None] >> torch.arange(8)) & 1
        assert torch.equal(bitmap.flatten().bool(), hi)
        order = torch.cat((hi.nonzero()[:, 0], (~hi).nonzero()[:, 0]))
        has_sinks = bool(blocks.at_start[block])
        for head in range(form.kv_heads):
            segment = data[form.head_offset(head) : form.head_offset(head) + form.head_bytes]
            keys, values = _rotate(blocks.keys[block, head]), _rotate(blocks.values[block, head])
            _assert_keys(keys, order, segment, form, has_sinks=has_sinks)
            _assert_values(values[order], segment, form)
            if has_sinks:
                stored = sinks[blocks.sink_slabs[block]].contiguous().view(torch.float16).view(form.kv_heads, -1)[head]
                wanted = torch.cat((keys[:SINK_TOKENS].flatten(), values[:SINK_TOKENS].flatten()))
                noise = torch.cat((_noise(keys)[:SINK_TOKENS].flatten(), _noise(values)[:SINK_TOKENS].flatten()))
                _assert_between(stored, (wanted - noise).half(), (wanted + noise).half())


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """x R in float64."""
    dim = x.shape[-1]
    rotated: torch.Tensor = torch.matmul(x.double(), rotation.matrix(dim).sign().double()) / (dim & -dim) ** 0.5
    return rotated


def _noise(rotated: torch.Tensor) -> torch.Tensor:
    """What float32 may change in a rotation: a few units of the last place of the row's length."""
    length: torch.Tensor = rotated.norm(dim=-1, keepdim=True)
    return 2.0**-21 * length.expand_as(rotated)


def _assert_keys(
    keys: torch.Tensor, order: torch.Tensor, segment: torch.Tensor, form: ZipFormat, *, has_sinks: bool
) -> None:
    lo, width = segment[: 4 * form.key_dim].view(torch.float16).view(2, -1)
    counted, noise = (x[SINK_TOKENS if has_sinks else 0 :] for x in (keys, _noise(keys)))
    _assert_between(lo, (counted - noise).amin(0).half(), (counted + noise).amin(0).half())
    lowest, highest = ((counted + sign * noise).amax(0) - lo.double() for sign in (-1, 1))
    _assert_between(width, lowest.clamp_min(WIDTH_MIN).half(), highest.clamp_min(WIDTH_MIN).half())
    start, slots, slot_noise = 0, keys[order], _noise(keys)[order]
    for region in form.keys:
        cells = 2**region.bits / width.double()
        of_region = slice(start, start + region.tokens)
        _assert_codes((slots[of_region] - lo.double()) * cells, slot_noise[of_region] * cells, segment, region)
        start += region.tokens


def _assert_values(values: torch.Tensor, segment: torch.Tensor, form: ZipFormat) -> None:
    start = 0
    for region in form.values:
        rows, half, step = values[start : start + region.tokens], 2 ** (region.bits - 1), VALUE_STEPS[region.bits]
        cell = (step * rows.square().mean(-1, keepdim=True).sqrt()).clamp_min(1e-30)
        _assert_codes(rows / cell + half, _noise(rows) / cell, segment, region)
        squares = rows.square().sum(-1)
        centres = unpack(segment, region) + (0.5 - half)
        scale = squares / ((rows * centres).sum(-1) * step).clamp_min(1e-30)
        wanted = (160 + 8 * torch.log2(scale.clamp_min(1e-30))).clamp(0, 255)
        wanted[squares == 0] = 0
        exponents = segment[form.exponent_offset + start :][: region.tokens]
        assert ((exponents - wanted).abs() <= 0.5 + BORDER).all()
        start += region.tokens


def _assert_codes(cells: torch.Tensor, noise: torch.Tensor, segment: torch.Tensor, region: Region) -> None:
    top = 2**region.bits - 1
    lowest, highest = ((cells + sign * (BORDER + noise)).floor().clamp(0, top) for sign in (-1, 1))
    _assert_between(unpack(segment, region), lowest, highest)


def _assert_between(found: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> None:
    wrong = (found < lowest) | (found > highest)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"
