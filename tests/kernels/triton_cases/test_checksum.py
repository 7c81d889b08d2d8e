"""The checksum's Triton kernel against its reference."""

import pytest
import torch

from zipserve.kernels.checksum import checksum_reference
from zipserve.kernels.checksum.triton_kernel import checksum_triton

pytestmark = pytest.mark.gpu
MASK = (1 << 64) - 1


def data_of(size: int) -> torch.Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [*range(9), 4095, 4096, 4097, 8195, 100_003])
def test_kernel_is_the_reference(size: int, device: torch.device) -> None:
    data = data_of(size)
    for seed in (0, MASK):
        assert checksum_triton(data.to(device), seed) == checksum_reference(data.numpy(), seed)


@pytest.mark.parametrize("start", [1, 2, 3, 4, 7])
def test_unaligned_starts(start: int, device: torch.device) -> None:
    data = data_of(5000)
    assert checksum_triton(data.to(device)[start:]) == checksum_reference(data[start:].numpy())


def test_sums_wrap(device: torch.device) -> None:
    """The second one passes 2^64."""
    data = torch.full((400_000,), 255, dtype=torch.uint8)
    assert checksum_triton(data.to(device)) == checksum_reference(data.numpy())


def test_bytes_that_are_not_contiguous_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        checksum_triton(data_of(64).to(device)[::2])
