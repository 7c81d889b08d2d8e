"""Clusters made of measured workers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import Layout
from zipserve.planner.native.arrangement import apart, together
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.profile import Hardware, Link, RoleProfile, WorkerProfile
from zipserve.planner.native.simulation import simulate
from zipserve.planner.native.step_model import StepModel, step_ms
from zipserve.planner.native.workers import Router
from zipserve.planner.workload import workload

PREFILL_STEP = StepModel(3.0, np.array([0.0, 100.0]), np.array([0.3, 0.2]), 1e-4, np.zeros(1), np.zeros(1), 0.0)
DECODE_STEP = StepModel(7.0, np.zeros(1), np.array([0.3]), 1e-4, np.array([0.0, 4.0]), np.array([1.0, 0.5]), 1e-3)
ALL = ("tokens", "pairs", "rows", "context")
ERRORS = (0.02, 0.06, 0.01, 0.04)


def profile(codec: str = "zip-4/32", terms: tuple[str, ...] = ALL) -> WorkerProfile:
    return WorkerProfile(
        hardware=Hardware("cpu-1", 1, "checkpoint", 1),
        layout=Layout("m", "0", 30, 3, 64, 64, "float32", codec),
        parameters=134_515_008,
        heads=9,
        roles={
            "prefill": RoleProfile(PREFILL_STEP, terms, 128, 8, 64, 16, 1_000, *ERRORS),
            "decode": RoleProfile(DECODE_STEP, terms, 256, 8, 64, 16, 1_000, *ERRORS),
        },
        link=Link(2e9, 3.5),
        overhead_ms=4.0,
        measured=True,
        made_at="2026-11-01T12:00:00Z",
    )


def test_one_request_takes_what_the_profile_says() -> None:
    one = profile()
    load = workload([200, 1], [2, 1], [0.0, 1e6])
    outcome = simulate(apart([one], [one]), load, 1000.0)
    first = step_ms(PREFILL_STEP, 128, 128 * 129 / 2, 0, 0)
    second = step_ms(PREFILL_STEP, 72, 72 * 128 + 72 * 73 / 2, 0, 0)
    assert outcome.ttft_ms[0] == pytest.approx(4 + first + second)
    pull_ms = 3.5 + (one.block_bytes + one.tail_bytes) / 2e6
    steps = [step_ms(DECODE_STEP, 0, 0, 1, context) for context in (201, 202)]
    assert outcome.all_gaps_ms[:2] == pytest.approx([pull_ms + steps[0], steps[1]])
    alone = simulate(together([one]), load, 1000.0)
    assert alone.ttft_ms[0] == pytest.approx(4 + step_ms(DECODE_STEP, 200, 200 * 201 / 2, 0, 0))


def test_arrangements_have_the_limits_of_their_profiles() -> None:
    one = profile()
    cluster = apart([one] * 2, [one] * 3, Router(32), slowdown_max=2.0)
    assert [(w.step_tokens, w.slots, w.blocks, w.tails) for w in cluster.prefills] == [(128, 8, 64, 16)] * 2
    assert [(w.step_tokens, w.slots, w.blocks, w.tails) for w in cluster.decodes] == [(256, 8, 64, 16)] * 3
    assert cluster.wiring == ((0, 1, 2), (0, 1, 2))
    assert cluster.decodes[0].slowdown_max == 2.0
    assert cluster.router.local_tokens_max == 32
    mixed = together([one], Router(0, 7, 8))
    assert mixed.router == Router(-1, 7, 8)
    assert not mixed.prefills


def test_what_was_not_measured_is_no_part_of_a_cluster() -> None:
    one, bare = profile(), profile(terms=("rows", "context"))
    assert apart([one], [bare]).decodes
    refused: list[tuple[str, Callable[[], Cluster]]] = [
        ("does not know what tokens, pairs cost a decode worker", lambda: together([bare])),
        ("does not know what tokens, pairs cost a decode worker", lambda: apart([one], [bare], Router(32))),
        ("does not know how fast KV is pulled", lambda: apart([one], [replace(one, link=None)])),
        ("no decode worker reads layout", lambda: apart([one], [profile("raw")])),
    ]
    for words, arrange in refused:
        with pytest.raises(InvalidRequestError, match=words):
            arrange()
