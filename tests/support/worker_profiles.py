"""Profiles of workers that nobody measured, for tests of what is planned with them."""

import numpy as np

from zipserve.common.kv.layout import Layout
from zipserve.planner.native.profile import Hardware, Link, RoleProfile, WorkerProfile
from zipserve.planner.native.step_model import StepModel

TERMS = ("tokens", "pairs", "rows", "context")


def profile_of(
    *,
    device: str = "gpu",
    threads: int = 0,
    codec: str = "zip-4/32",
    constant_ms: float = 10.0,
    token_ms: float = 1.0,
    row_ms: float = 2.0,
    step_tokens: int = 256,
    slots: int = 16,
    blocks: int = 256,
    link: Link | None = Link(1e9, 2.0),  # noqa: B008  it is frozen
    terms: tuple[str, ...] = TERMS,
    measured: bool = True,
) -> WorkerProfile:
    """A worker that can do both, with straight curves."""
    zero = np.zeros(1)
    step = StepModel(constant_ms, zero, np.array([token_ms]), 1e-4, zero, np.array([row_ms]), 1e-3)
    role = RoleProfile(step, terms, step_tokens, slots, blocks, 64, 1_000, 0.02, 0.06, 0.01, 0.03)
    layout = Layout("a-model", "0123", layers=2, kv_heads=1, key_dim=64, value_dim=64, dtype="float32", codec=codec)
    return WorkerProfile(
        hardware=Hardware(device, threads, "checkpoint", 1),
        layout=layout,
        parameters=1_000_000,
        heads=4,
        roles={"prefill": role, "decode": role},
        link=link,
        overhead_ms=3.0,
        measured=measured,
        made_at="2026-11-01T12:00:00Z",
    )
