"""Dequantization's Triton kernel against its reference; all bytes between the blocks are those of NaNs."""

import pytest
import torch

from tolerances import DECODED
from zipserve.kernels.dequantize import dequantize_reference
from zipserve.kernels.dequantize.triton_kernel import dequantize_triton
from zipserve.kernels.quantize import quantize_reference
from zipserve.kernels.saliency import classify
from zipserve.kernels.zipformat import PROFILES, ZipFormat

pytestmark = pytest.mark.gpu


def sealed(form: ZipFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two blocks, the second at the start of its sequence, among slabs of NaNs: data, slabs, sinks and their slabs."""
    generator = torch.Generator().manual_seed(form.key_dim)
    data = torch.full((4, form.layer_bytes + 160), 255, dtype=torch.uint8)[:, 128:-32]
    sinks = torch.full((4, form.sinks_layer_bytes + 32), 255, dtype=torch.uint8)[:, 16:-16]
    slabs, sink_slabs = torch.tensor([3, 1]), torch.tensor([-1, 2])
    keys = torch.randn(2, form.kv_heads, form.block_tokens, form.key_dim, generator=generator)
    values = torch.randn(2, form.kv_heads, form.block_tokens, form.value_dim, generator=generator)
    hi = classify(torch.rand(2, form.block_tokens, generator=generator), form, sink_slabs >= 0)
    assert not quantize_reference(keys, values, hi, form, data, slabs, sinks, sink_slabs).any()
    return data, slabs, sinks, sink_slabs


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("heads", "key_dim", "value_dim", "tokens"), [(2, 64, 64, 128), (1, 16, 80, 64), (1, 48, 16, 192)]
)
def test_kernel_is_the_reference(
    profile: str, heads: int, key_dim: int, value_dim: int, tokens: int, device: torch.device
) -> None:
    form = ZipFormat(heads, key_dim, value_dim, tokens, profile)
    data, slabs, sinks, sink_slabs = sealed(form)
    wanted = dequantize_reference(data, slabs, form, sinks, sink_slabs)
    place = [tensor.to(device) for tensor in (data, slabs, sinks, sink_slabs)]
    found = dequantize_triton(place[0], place[1], form, place[2], place[3])
    for one, other in zip(found, wanted, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=DECODED)


def test_slabs_between_words_are_refused(device: torch.device) -> None:
    form = ZipFormat(1, 16, 16, 64)
    data = torch.zeros(2, form.layer_bytes + 2, dtype=torch.uint8, device=device)
    slabs = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        dequantize_triton(data[:, : form.layer_bytes], slabs, form, data[:, :256], slabs - 1)
