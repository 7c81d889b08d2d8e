"""What is timed: each operation on its CPU kernel, its reference, and what it is to be compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

from zipserve.bench.kernels import data
from zipserve.bench.kernels.data import DecodeBatch, Heads
from zipserve.common.errors import InternalError
from zipserve.kernels.attention import decode_attention, decode_attention_reference
from zipserve.kernels.checksum import checksum, checksum_reference
from zipserve.kernels.dequantize import dequantize, dequantize_reference
from zipserve.kernels.prefill_attention import Prefix, prefill_attention, prefill_attention_reference
from zipserve.kernels.quantize import quantize, quantize_reference
from zipserve.kernels.saliency import log_sum_exp, probe_scores, probe_scores_reference
from zipserve.kernels.zipformat import probe_offsets

BLOCK = 128


@dataclass(frozen=True)
class Case:
    """One operation on one shape."""

    name: str
    size_bytes: int
    """What it must read or write at least; GB/s count these."""
    ways: dict[str, Callable[[], object]]
    """By name: `kernel`, and what it is compared with."""
    differs: Callable[[], float]
    """Greatest difference between kernel and reference, on a part of the data that the reference can do."""
    tolerance: float
    slow_ways: dict[str, Callable[[], object]] = field(default_factory=dict)
    """Timed once, on a part of the data: the references."""
    slow_share: float = 1.0
    """What part of the data that is."""

    def require_equal(self) -> None:
        """
        Raises:
            InternalError: kernel and reference disagree, so that the kernel's speed means nothing.
        """
        difference = self.differs()
        if not difference <= self.tolerance:
            raise InternalError(f"{self.name}: kernel and reference differ by {difference:.3g}")


def all_cases(heads: Heads, profile: str, *, rows: int, context: int) -> list[Case]:
    """The operations on one shape of attention."""
    count = rows * context // BLOCK
    keys, values = data.blocks(heads, count)
    return [
        _checksum(heads, keys),
        *_codec(heads, profile, keys, values),
        _saliency(heads),
        _attention(heads, profile, keys, values, rows),
        _prefill(heads, profile, keys[:0], values[:0], context // 4),
        _prefill(heads, profile, keys[: context // BLOCK], values[: context // BLOCK], BLOCK),
    ]


def attention_case(heads: Heads, profile: str, *, rows: int, context: int) -> Case:
    """Decode attention alone."""
    return _attention(heads, profile, *data.blocks(heads, rows * context // BLOCK), rows)


def _checksum(heads: Heads, keys: torch.Tensor) -> Case:
    octets = keys.view(torch.uint8).flatten().numpy()
    part = octets[: 1 << 20]
    return Case(
        f"checksum {heads.name}",
        octets.nbytes,
        {"kernel": lambda: checksum(octets)},
        lambda: float(checksum(part) != checksum_reference(part)),
        0.0,
        {"reference": lambda: checksum_reference(part)},
        part.nbytes / octets.nbytes,
    )


def _codec(heads: Heads, profile: str, keys: torch.Tensor, values: torch.Tensor) -> list[Case]:
    count = len(keys)
    form, packed = data.zipped(heads, profile, keys, values)
    hi = torch.arange(BLOCK).expand(count, -1) < form.hi_tokens
    slabs, none = torch.arange(count), torch.full((count,), -1)
    out = torch.empty_like(packed)
    sinks, few = data.no_sinks(form), slice(0, 2)

    def write(operation: Callable[..., torch.Tensor], of: slice) -> Callable[[], object]:
        return lambda: operation(keys[of], values[of], hi[of], form, out, slabs[of], sinks, none[of])

    def codes_differ() -> float:
        write(quantize, few)()
        found = out[few].clone()
        write(quantize_reference, few)()
        return (found != out[few]).float().mean().item()

    def read(operation: Callable[..., tuple[torch.Tensor, torch.Tensor]], of: slice) -> list[torch.Tensor]:
        return list(operation(packed, slabs[of], form, sinks, none[of]))

    def values_differ() -> float:
        pairs = zip(read(dequantize, few), read(dequantize_reference, few), strict=True)
        return max((one - other).abs().max().item() for one, other in pairs)

    everything = slice(None)
    return [
        Case(
            f"quantize {profile} {heads.name}",
            2 * keys.nbytes,
            {"kernel": write(quantize, everything)},
            codes_differ,
            0.005,  # share of bytes: codes at the border of two cells
            {"reference": write(quantize_reference, few)},
            2 / count,
        ),
        Case(
            f"dequantize {profile} {heads.name}",
            2 * keys.nbytes,
            {"kernel": lambda: read(dequantize, everything)},
            values_differ,
            1e-4,
            {"reference": lambda: read(dequantize_reference, few)},
            2 / count,
        ),
    ]


def _saliency(heads: Heads, tokens: int = 1024) -> Case:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(heads.kv, tokens, heads.dim, generator=generator)
    own = torch.tensor([start + at for start in range(0, tokens, BLOCK) for at in probe_offsets(BLOCK)])
    query = torch.randn(heads.query, len(own), heads.dim, generator=generator)
    arguments = (query, keys, own, torch.zeros_like(own), own // BLOCK, torch.arange(0, tokens, BLOCK), BLOCK, 0.125)
    lse = log_sum_exp(query, keys, own, torch.zeros_like(own), 0.125)
    return Case(
        f"saliency {heads.name} of {tokens} tokens",
        keys.nbytes,
        {"kernel": lambda: probe_scores(*arguments), "known sums": lambda: probe_scores(*arguments, lse=lse)},
        lambda: (probe_scores(*arguments) - probe_scores_reference(*arguments, None, None)).abs().max().item(),
        1e-4,
        {"reference": lambda: probe_scores_reference(*arguments, None, None)},
    )


def _attention(heads: Heads, profile: str, keys: torch.Tensor, values: torch.Tensor, rows: int) -> Case:
    batch = DecodeBatch.of(heads, rows, len(keys) // rows)
    scale = heads.dim**-0.5
    zip_form, packed = data.zipped(heads, profile, keys, values)
    of_zip, of_raw = batch.sealed(zip_form, packed), batch.sealed(*data.raw(heads, keys, values))
    few = DecodeBatch.of(heads, 2, 2)
    few_zip = few.sealed(zip_form, packed)
    # What SDPA likes best: contiguous keys [rows, kv heads, tokens, dim] and the heads of a group as query rows.
    long_keys, long_values = (
        torch.unflatten(part, 0, (rows, -1)).transpose(1, 2).flatten(2, 3).contiguous() for part in (keys, values)
    )
    grouped = torch.unflatten(batch.query, 1, (heads.kv, -1))

    def on_few(operation: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
        return operation(
            few.query, few_zip, few.open_blocks, few.first, scale=scale, softcap=None, sink_logits=None,
            with_weights=False,
        )[0]  # fmt: skip

    return Case(
        f"attention {profile} {heads.name} batch {rows} context {long_keys.shape[2]}",
        packed.nbytes,
        {
            "kernel": lambda: decode_attention(batch.query, of_zip, batch.open_blocks, batch.first, scale=scale),
            "raw pages": lambda: decode_attention(batch.query, of_raw, batch.open_blocks, batch.first, scale=scale),
            "SDPA": lambda: F.scaled_dot_product_attention(grouped, long_keys, long_values, scale=scale),
        },
        lambda: (on_few(decode_attention) - on_few(decode_attention_reference)).abs().max().item(),
        1e-5,
        {"reference": lambda: on_few(decode_attention_reference)},
        few.table.numel() / batch.table.numel(),
    )


def _prefill(heads: Heads, profile: str, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> Case:
    """A chunk of a prompt behind sealed blocks; or the whole of one, where there are none."""
    generator = torch.Generator().manual_seed(4)
    query, key, value = (
        torch.randn(tokens, count, heads.dim, generator=generator).transpose(0, 1)
        for count in (heads.query, heads.kv, heads.kv)
    )
    form, packed = data.zipped(heads, profile, keys, values)
    slabs = torch.arange(len(keys))
    prefix = Prefix(form, packed, slabs, data.no_sinks(form), torch.full_like(slabs, -1)) if len(keys) else None
    start, scale = len(keys) * BLOCK, heads.dim**-0.5
    long_keys, long_values = (
        torch.cat((sealed.transpose(0, 1).flatten(1, 2), new), 1).repeat_interleave(heads.query // heads.kv, 0)
        for sealed, new in ((keys, key), (values, value))
    )
    mask = torch.ones(tokens, start + tokens, dtype=torch.bool).tril(start) if start else None

    def attend(operation: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
        return operation(
            query, key, value, start, scale=scale, prefix=prefix, first=None, softcap=None, sink_logits=None,
            lse_rows=None,
        )[0]  # fmt: skip

    return Case(
        f"prefill {profile} {heads.name} of {tokens} tokens behind {start}",
        packed.nbytes + 2 * key.nbytes,
        {
            "kernel": lambda: attend(prefill_attention),
            "SDPA": lambda: F.scaled_dot_product_attention(
                query[None], long_keys[None], long_values[None], mask, is_causal=mask is None, scale=scale
            ),
        },
        lambda: (attend(prefill_attention) - attend(prefill_attention_reference)).abs().max().item(),
        1e-5,
        {"reference": lambda: attend(prefill_attention_reference)},
    )
