"""The definition of the zip codec's encoder, in PyTorch."""

import torch

from zipserve.kernels import rotation
from zipserve.kernels.zipformat import (
    EXPONENT_BIAS,
    EXPONENTS_PER_OCTAVE,
    PLANES,
    SINK_TOKENS,
    VALUE_STEPS,
    WIDTH_MIN,
    Region,
    ZipFormat,
)

NON_FINITE = 1
OUT_OF_RANGE = 2
_SCALE_MAX = 2.0 ** ((255 - EXPONENT_BIAS + 0.5) / EXPONENTS_PER_OCTAVE)


def quantize_reference(
    keys: torch.Tensor,
    values: torch.Tensor,
    hi: torch.Tensor,
    form: ZipFormat,
    out: torch.Tensor,
    slabs: torch.Tensor,
    sinks: torch.Tensor,
    sink_slabs: torch.Tensor,
) -> torch.Tensor:
    """See zipserve.kernels.quantize.quantize."""
    status = torch.zeros(len(slabs), dtype=torch.int32, device=keys.device)
    for block, slab in enumerate(slabs.tolist()):
        sink_slab = int(sink_slabs[block])
        written = encode_block(
            rotation.rotate(keys[block]), rotation.rotate(values[block]), hi[block], form, has_sinks=sink_slab >= 0
        )
        if isinstance(written, int):
            status[block] = written
            continue
        out[slab] = written[0]
        if sink_slab >= 0:
            sinks[sink_slab] = written[1]
    return status


def encode_block(
    keys: torch.Tensor, values: torch.Tensor, hi: torch.Tensor, form: ZipFormat, *, has_sinks: bool
) -> tuple[torch.Tensor, torch.Tensor] | int:
    """One layer of one block, already rotated: the bytes of the layer and of its sinks; or why it is refused.

    Args:
        keys: float32 [kv_heads, block_tokens, key_dim].
        values: float32 [kv_heads, block_tokens, value_dim].
        hi: bool [block_tokens], form.hi_tokens of them true.
        has_sinks: the block starts at position 0; `hi` must be true there.
    """
    if not (keys.isfinite().all() and values.isfinite().all()):
        return NON_FINITE
    order = torch.argsort((~hi).to(torch.int8), stable=True)  # token of each slot
    sink_keys, sink_values = keys[:, :SINK_TOKENS].half(), values[:, :SINK_TOKENS].half()
    lo, width = _channel_range(keys[:, SINK_TOKENS:] if has_sinks else keys)
    scales = _Values(values[:, order], form)
    limits = [lo, width, sink_keys, sink_values] if has_sinks else [lo, width]
    if not all(limit.isfinite().all() for limit in limits) or scales.overflow:
        return OUT_OF_RANGE
    parts = [_bitmap(hi)]
    slots = keys[:, order]
    for head in range(form.kv_heads):
        parts += [lo[head].view(torch.uint8), width[head].view(torch.uint8)]
        start = 0
        for region in form.keys:
            codes = _key_codes(slots[head, start : start + region.tokens], lo[head], width[head], region.bits)
            parts.append(pack(codes, region))
            start += region.tokens
        parts.append(scales.exponents[head])
        start = 0
        for region in form.values:
            parts.append(pack(scales.codes[head, start : start + region.tokens], region))
            start += region.tokens
    heads = torch.cat((sink_keys.flatten(1), sink_values.flatten(1)), 1)
    return torch.cat(parts), heads.contiguous().view(torch.uint8).flatten()


def pack(codes: torch.Tensor, region: Region) -> torch.Tensor:
    """Codes [tokens, dim] as the bytes of a region."""
    along = codes.T if region.is_key else codes  # [contracted, free]
    parts, shift = [], region.bits
    for bits in PLANES[region.bits]:
        shift -= bits
        plane = (along.long() >> shift) & ((1 << bits) - 1)
        per_word = 32 // bits
        rows = -(-plane.shape[0] // per_word)
        padded = torch.zeros(rows * per_word, plane.shape[1], dtype=torch.int64, device=codes.device)
        padded[: plane.shape[0]] = plane
        places = bits * torch.arange(per_word, device=codes.device)[None, :, None]
        words = (padded.view(rows, per_word, -1) << places).sum(1)
        octets = torch.stack([(words >> (8 * byte)) & 0xFF for byte in range(4)], -1)
        parts.append(octets.to(torch.uint8).flatten())
    return torch.cat(parts)


def _bitmap(hi: torch.Tensor) -> torch.Tensor:
    weights = 1 << torch.arange(8, device=hi.device)
    return (hi.view(-1, 8).long() * weights).sum(1).to(torch.uint8)


def _channel_range(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 minimum and width of each channel, [kv_heads, key_dim]; infinite where float16 is too small."""
    lo = keys.amin(1).half()
    width = (keys.amax(1) - lo.float()).clamp_min(WIDTH_MIN).half()
    return lo, width


def _key_codes(keys: torch.Tensor, lo: torch.Tensor, width: torch.Tensor, bits: int) -> torch.Tensor:
    """floor((x - lo) 2^b / width), clipped to the 2^b cells; [tokens, key_dim]."""
    cells = 1 << bits
    return torch.floor((keys - lo.float()) * cells / width.float()).clamp(0, cells - 1).to(torch.int32)


class _Values:
    """Codes and exponents of values [kv_heads, slots, value_dim]."""

    def __init__(self, values: torch.Tensor, form: ZipFormat) -> None:
        device = values.device
        bits = torch.cat([torch.full((region.tokens,), region.bits, device=device) for region in form.values])
        steps = torch.tensor([VALUE_STEPS.get(b, 0.0) for b in range(5)], device=device)[bits][:, None]
        half = (1 << (bits - 1))[:, None]
        cell = steps * values.square().mean(-1, keepdim=True).sqrt()
        index = torch.floor(values / cell.clamp_min(1e-30))
        index = torch.maximum(torch.minimum(index, half - 1.0), -1.0 * half)
        self.codes = (index + half).to(torch.int32)
        """[kv_heads, slots, value_dim]"""
        squares = values.square().sum(-1)
        # Unbiased: <x, x'> = |x|^2, so that nothing is shrunk on average.
        scale = squares / (values * (index + 0.5) * steps).sum(-1).clamp_min(1e-30)
        self.overflow = not bool((scale <= _SCALE_MAX).all())  # nor is a NaN, of infinite squares, below it
        exponents = torch.round(EXPONENT_BIAS + EXPONENTS_PER_OCTAVE * torch.log2(scale.clamp_min(1e-30)))
        self.exponents = torch.where(squares > 0, exponents.clamp(0, 255), 0.0).to(torch.uint8)
        """[kv_heads, slots]"""
