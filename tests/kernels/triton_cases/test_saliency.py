"""Probe saliency's Triton kernels against their reference; keys that no row sees are NaN."""

import pytest
import torch

from tolerances import WEIGHTS
from zipserve.kernels.saliency import probe_scores_reference
from zipserve.kernels.saliency.triton_kernel import log_sum_exp_triton, probe_scores_triton
from zipserve.kernels.zipformat import probe_offsets

pytestmark = pytest.mark.gpu


def compare(
    device: torch.device,
    *,
    heads: tuple[int, int] = (2, 3),
    dim: int = 32,
    tokens: int = 150,
    before: int = 10,
    window: int = 1000,
    softcap: float | None = None,
    with_sinks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """All blocks of 64 behind the first `before` tokens, and what they are: heads = KV heads, query heads of each."""
    generator = torch.Generator().manual_seed(dim)
    starts = torch.arange(before, tokens, 64)
    own = (starts[:, None] + torch.tensor(probe_offsets(64))).flatten()
    block = torch.arange(len(starts)).repeat_interleave(len(own) // len(starts))
    own, block = own[own < tokens], block[own < tokens]
    first = (own - window + 1).clamp_min(0)
    keys = torch.randn(heads[0], tokens, dim, generator=generator)
    index = torch.arange(tokens)
    keys[:, ~((index >= first[:, None]) & (index <= own[:, None])).any(0)] = torch.nan
    query = 2 * torch.randn(heads[0] * heads[1], len(own), dim, generator=generator)
    sinks = 2 + torch.randn(len(query), generator=generator) if with_sinks else None
    query, keys = query.to(dtype), keys.to(dtype)
    wanted = probe_scores_reference(query, keys, own, first, block, starts, 64, dim**-0.5, softcap, sinks)
    assert wanted.isfinite().all()
    query, keys, own, first, block, starts = (part.to(device) for part in (query, keys, own, first, block, starts))
    sinks = None if sinks is None else sinks.to(device)
    found = probe_scores_triton(query, keys, own, first, block, starts, 64, dim**-0.5, softcap, sinks).cpu()
    torch.testing.assert_close(found, wanted, rtol=0, atol=WEIGHTS)
    lse = log_sum_exp_triton(query, keys, own, first, dim**-0.5, softcap, sinks)
    of_blocks = keys[:, before:], own - before, first - before, block, starts - before
    known = probe_scores_triton(query, *of_blocks, 64, dim**-0.5, softcap, sinks, lse).cpu()
    torch.testing.assert_close(known, wanted, rtol=0, atol=WEIGHTS)
    return found


@pytest.mark.parametrize(("heads", "dim"), [((1, 1), 16), ((2, 4), 48), ((3, 7), 16)])
def test_heads_and_dims(heads: tuple[int, int], dim: int, device: torch.device) -> None:
    compare(device, heads=heads, dim=dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device, interpreted: bool) -> None:
    if interpreted and dtype == torch.bfloat16:
        pytest.xfail("the interpreter multiplies bfloat16 as integers")
    compare(device, dim=64, dtype=dtype)


def test_each_option_does_something(device: torch.device) -> None:
    plain = compare(device)
    for found in (
        compare(device, window=9),
        compare(device, softcap=0.7),
        compare(device, with_sinks=True),
        compare(device, window=70, softcap=2.0, with_sinks=True),
    ):
        assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("tokens", [11, 74, 75, 330])
def test_lengths(tokens: int, device: torch.device) -> None:
    """From a block whose only probe row has not come yet to several blocks."""
    assert len(compare(device, tokens=tokens)) == -(-(tokens - 10) // 64)


def test_runs_are_equal(device: torch.device) -> None:
    assert torch.equal(compare(device), compare(device))
