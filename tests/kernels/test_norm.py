"""RMS norms: the kernel against the reference."""

import pytest
import torch

from zipserve.kernels.norm import rms_norm, rms_norm_reference

TOLERANCE = 2e-6


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 2, 64), (2, 3, 4, 100), (700, 130)])
def test_equals_the_reference(shape: tuple[int, ...]) -> None:
    x, weight = numbers(*shape), numbers(shape[-1], seed=1)
    found, wanted = rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
    assert found.shape == x.shape
    assert (found - wanted).norm() <= TOLERANCE * wanted.norm()


def test_rows_that_do_not_lie_one_behind_another() -> None:
    x, weight = numbers(3, 4, 16), numbers(16, seed=1)
    assert torch.equal(rms_norm(x.transpose(0, 1), weight, 1e-5), rms_norm(x, weight, 1e-5).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype_of_its_rows(dtype: torch.dtype) -> None:
    x, weight = numbers(3, 16).to(dtype), numbers(16, seed=1)
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype is dtype
    assert torch.equal(found, rms_norm(x.float(), weight, 1e-5).to(dtype))


def test_no_rows() -> None:
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)


@pytest.mark.parametrize("weight", [torch.ones(9), torch.ones(8).half(), torch.ones(16)[::2]])
def test_refuses(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="for rows of 8 numbers"):
        rms_norm(torch.zeros(1, 8), weight, 1e-5)
