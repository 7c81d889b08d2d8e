"""The fixed rotation of keys and values: a signed Hadamard matrix, the same for all layers and heads.

It spreads outlier channels over all channels, which is what makes few bits enough. For D channels and p the largest
power of two that divides D, R = diag(signs) (I ⊗ H_p) / sqrt(p) with Sylvester's H_p; x R is a row's rotated form and
R R^T = 1. Source of the idea: QuaRot (2024).
"""

import functools

import torch

_SEED = 0x9E3779B9


@functools.cache
def signs(dim: int) -> tuple[float, ...]:
    """Sign of each channel: the top bit of a linear congruential generator, x <- 1664525 x + 1013904223 mod 2^32."""
    found, x = [], _SEED
    for _ in range(dim):
        x = (1664525 * x + 1013904223) & 0xFFFFFFFF
        found.append(-1.0 if x >> 31 else 1.0)
    return tuple(found)


@functools.cache
def matrix(dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """R, float32 [dim, dim]."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(hadamard)) == 0:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    blocks = torch.kron(torch.eye(dim // len(hadamard), dtype=torch.float64), hadamard / len(hadamard) ** 0.5)
    return (torch.tensor(signs(dim), dtype=torch.float64)[:, None] * blocks).float().to(device)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x R, float32; x is [..., dim]."""
    return x.float() @ matrix(x.shape[-1], x.device)


def unrotate(x: torch.Tensor) -> torch.Tensor:
    """x R^T, float32; x is [..., dim]."""
    return x.float() @ matrix(x.shape[-1], x.device).T
