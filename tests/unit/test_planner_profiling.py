"""What `zipserve profile` makes workers compute, and what it makes of what they tell."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import InvalidRequestError, UnavailableError
from zipserve.common.kv.layout import Layout
from zipserve.common.kv.refs import message_of
from zipserve.common.registry import WorkerRecord
from zipserve.common.rpc.channel import ChannelPool
from zipserve.common.steps import Step, pairs_of
from zipserve.planner.native.profile import Link
from zipserve.planner.native.step_model import step_ms
from zipserve.planner.profiling import cluster as cluster_module
from zipserve.planner.profiling import grid
from zipserve.planner.profiling.assembly import file_name, hardware_of, kinds, profile_of
from zipserve.planner.profiling.calls import line
from zipserve.planner.profiling.cluster import Cluster, Watched
from zipserve.planner.profiling.drive import drive
from zipserve.planner.profiling.grid import Limits
from zipserve.v1.worker_service_pb2 import Capabilities, ListStepsResponse, Load, WorkerRole, WorkerStep

LAYOUT = Layout("m/tiny", "0", layers=2, kv_heads=2, key_dim=16, value_dim=16, dtype="float32")
ROLES = {"prefill": WorkerRole.WORKER_ROLE_PREFILL, "decode": WorkerRole.WORKER_ROLE_DECODE}


def watched(role: str, steps: list[Step], **changes: object) -> Watched:
    facts = {
        "worker_id": f"{role}-0", "role": ROLES[role], "layout": message_of(LAYOUT), "device": "cpu", "threads": 1,
        "weights": "checkpoint", "parameters": 1000, "heads": 4, "step_tokens": 256, "sequences_max": 8, **changes,
    }  # fmt: skip
    return Watched(WorkerRecord(Capabilities(**facts), Load(total_blocks=64, total_tails=8), 1), steps)  # type: ignore[arg-type]


def prompt_steps(count: int, slower: float = 1.0) -> list[Step]:
    draw = np.random.default_rng(5)
    found = []
    for _ in range(count):
        tokens, before = int(draw.integers(1, 257)), int(draw.integers(0, 2000))
        ms = slower * (3 + 0.5 * tokens + 1e-4 * pairs_of(before, tokens))
        found.append(Step(tokens, pairs_of(before, tokens), 0, 0, ms / 1e3))
    return found


limits = st.builds(
    Limits,
    slots=st.integers(1, 64),
    blocks=st.integers(1, 300),
    tails=st.integers(1, 64),
    block_tokens=st.sampled_from([16, 128]),
    tokens_max=st.integers(1, 10_000),
)


@given(limits=limits, seed=st.integers(0, 99))
def test_no_setting_is_more_than_a_worker_bears(limits: Limits, seed: int) -> None:
    random = Random(seed)
    asked = [*grid.prompts(limits, random), *(list(rows.contexts) for rows in grid.rows(limits, random))]
    for lengths in asked:
        assert min(lengths) >= 1
        assert max(lengths) <= limits.tokens_max
        assert len(lengths) <= min(limits.slots, limits.tails)
        assert sum(-(-tokens // limits.block_tokens) for tokens in lengths) <= limits.blocks


def test_a_round_has_short_and_long_single_and_many() -> None:
    limits = Limits(slots=32, blocks=256, tails=64, block_tokens=128, tokens_max=4000)
    batches = list(grid.prompts(limits, Random(1)))
    assert {len(batch) for batch in batches} == {1, 3, 8}
    assert min(map(min, batches)) < 10
    assert max(map(max, batches)) > 2000
    settings = list(grid.rows(limits, Random(1)))
    assert {len(rows.contexts) for rows in settings} >= {1, 8, 32}
    mixed = [rows for rows in settings if rows.beside]
    assert 0.4 < len(mixed) / len(settings) < 0.6
    assert [len(batch) for batch in grid.prompts(limits, Random(2))] != [len(batch) for batch in batches]


def test_workers_of_a_kind_share_a_profile() -> None:
    workers = [
        watched("prefill", prompt_steps(300)),
        watched("prefill", prompt_steps(300), sequences_max=4),
        watched("prefill", prompt_steps(300, slower=2.0), threads=4),
    ]
    found = {hardware.device: those for (hardware, _), those in kinds(workers).items()}
    assert {device: len(those) for device, those in found.items()} == {"cpu-1": 2, "cpu-4": 1}
    both = profile_of(found["cpu-1"], Link(1e9, 2.0), 3.0, "now")
    role = both.role("prefill")
    assert (role.steps, role.slots, role.terms) == (600, 4, ("tokens", "pairs"))
    assert step_ms(role.step, 100, 5050, 0, 0) == pytest.approx(3 + 50 + 0.505, rel=0.02)
    assert role.error_p90 < 0.05
    assert both.link == Link(1e9, 2.0)
    assert file_name(both) == "tiny_cpu-1_tp1_raw.json"


def test_a_gpu_is_called_by_its_name() -> None:
    hardware = hardware_of(Capabilities(device="NVIDIA H200 141GB", threads=16, weights="checkpoint"))
    assert (hardware.device, hardware.threads) == ("nvidia-h200-141gb", 0)


def test_who_did_too_little_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"decode workers \(decode-0\): 0 steps are no measure"):
        profile_of([watched("prefill", prompt_steps(100)), watched("decode", [])], None, None, "now")


def test_an_older_profile_has_what_is_missing_now() -> None:
    older = profile_of([watched("prefill", prompt_steps(300))], Link(1e9, 2.0), 3.0, "then")
    now = profile_of([watched("prefill", [])], None, None, "now", older)
    assert now.roles["prefill"] is older.roles["prefill"]
    assert (now.link, now.overhead_ms, now.made_at) == (older.link, 3.0, "now")
    slower = profile_of([watched("prefill", prompt_steps(300, slower=3.0))], None, 9.0, "now", older)
    assert step_ms(slower.roles["prefill"].step, 100, 5050, 0, 0) == pytest.approx(3 * 53.5, rel=0.02)
    assert slower.overhead_ms == 9.0


@given(
    rate=st.floats(1e6, 1e11),
    fixed_ms=st.floats(0.1, 50),
    sizes=st.lists(st.integers(10**4, 10**8), min_size=8, max_size=30, unique=True),
)
def test_a_line_through_pulls(rate: float, fixed_ms: float, sizes: list[int]) -> None:
    sizes += [10**4, 10**8]
    link = line([(float(size), fixed_ms + 1e3 * size / rate) for size in sizes])
    for size in (10**4, 10**6, 10**8):
        expected = fixed_ms + 1e3 * size / rate
        assert link.fixed_ms + 1e3 * size / link.bytes_per_s == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("role", ROLES)
async def test_a_worker_without_room_is_named(role: str) -> None:
    """Nothing to compute must not mean to look for it for ever."""
    async with ChannelPool(1 << 20) as channels:
        cluster = Cluster(
            [watched(role, [], sequences_max=0, context_tokens=64, vocab_tokens=9, block_tokens=16)], "", channels
        )
        with pytest.raises(InvalidRequestError, match=f"{role}-0 has no room for any prompt: .*slots=0"):
            await drive(cluster, 5.0, 600)


@pytest.mark.parametrize(("counted", "lost"), [(0, 0), (7, 0), (3, 1)])
async def test_steps_that_are_counted_wrongly_are_refused(
    counted: int, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ListStepsResponse(steps=[WorkerStep(prompt_tokens=1)] * 3, next=counted, lost=lost)

    class Stub:
        def __init__(self, channel: object) -> None: ...

        async def ListSteps(self, request: object, **_: object) -> ListStepsResponse:
            return answer

    monkeypatch.setattr(cluster_module, "WorkerServiceStub", Stub)
    async with ChannelPool(1 << 20) as channels:
        with pytest.raises(UnavailableError, match=f"counts its steps from 0 to {counted}, wrongly"):
            await cluster_module._read(channels, watched("decode", [], address="127.0.0.1:1"))
