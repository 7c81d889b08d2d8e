"""The prefill worker alone: every RPC, every refusal, and a request that goes away at every stage."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import Counter

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from workers import BLOCK, Gate, GoAway, Prefill, Workers, claims_of, health, prompt, value, ways, workers
from zipserve.common import errors
from zipserve.common.kv.header import SlabIdentity, verify
from zipserve.common.kv.layout import HEADER_BYTES, SlabKind
from zipserve.common.kv.prefix import prefix_hashes
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_seconds
from zipserve.common.rpc.status import client_errors, from_rpc_error
from zipserve.common.sampling import Sampling
from zipserve.engine.sampling import Sampler
from zipserve.v1.kv_pb2 import SLAB_KIND_BLOCK, SLAB_KIND_TAIL, KvHandle
from zipserve.v1.prefill_service_pb2 import PrefillResponse, ReleaseHandleRequest
from zipserve.v1.sampling_pb2 import SamplingParams
from zipserve.v1.worker_service_pb2 import GetCapabilitiesRequest, WorkerRole
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

SERVICES = ("", "zipserve.v1.PrefillService", "zipserve.v1.KvTransferService", "zipserve.v1.WorkerService")
PREFILL = "/zipserve.v1.PrefillService/Prefill"


@pytest.fixture
async def prefill(cluster_workers: Workers) -> Prefill:
    return await cluster_workers.prefill(Fabric().open)


def start(worker: Prefill, tokens: int | list[int], **options: Any) -> "asyncio.Task[PrefillResponse]":
    return asyncio.create_task(worker.compute(tokens, **options))


async def release(worker: Prefill, handle: KvHandle) -> None:
    with client_errors():
        await worker.stub.ReleaseHandle(ReleaseHandleRequest(handle=handle), timeout=5)


async def queued(worker: Prefill, count: int) -> None:
    await until(lambda: worker.service.load().queued_requests == count, f"{count} requests wait")


# What it answers.


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 40, 200])
async def test_a_prompt(tokens: int, prefill: Prefill, tiny_model: Path) -> None:
    answer = await prefill.compute(tokens)
    assert Oracle(tiny_model).first_wrong(prompt(tokens), [answer.token_id]) is None
    claims, device = claims_of(answer.handle), prefill.service.device
    full, rest = divmod(tokens, BLOCK)
    assert (claims.worker_id, claims.incarnation, claims.tokens) == ("prefill-0", device.incarnation, tokens)
    assert [ref.kind for ref in claims.refs] == [SLAB_KIND_BLOCK] * full + [SLAB_KIND_TAIL] * bool(rest)
    assert [ref.start_position for ref in claims.refs] == list(range(0, tokens, BLOCK))
    assert len(claims.lease_id) == 16
    assert to_seconds(claims.lease_ttl) == prefill.settings.lease_ttl_s
    names = prefix_hashes(prompt(tokens), BLOCK, device.layout.fingerprint)
    for ref, name in zip(claims.refs, names, strict=True):
        identity = SlabIdentity(
            SlabKind(ref.kind),
            device.layout.fingerprint,
            device.incarnation,
            ref.generation,
            ref.start_position,
            BLOCK if ref.kind == SLAB_KIND_BLOCK else rest,
            ref.bytes - HEADER_BYTES,
            name,
        )
        verify(device.slab_view(SlabKind(ref.kind), ref.slab), identity, ref.checksum)
    load = await prefill.load()
    assert (load.free_blocks, load.free_tails, load.leases) == (24 - full, 6 - bool(rest), 1)
    await release(prefill, answer.handle)


async def test_prompts_computed_together_are_those_computed_alone(prefill: Prefill, tiny_model: Path) -> None:
    gate = Gate(prefill.service.device)
    first = start(prefill, 5)
    await gate.entered()
    together = [start(prefill, prompt(10 + 7 * i, salt=i)) for i in range(3)]
    await queued(prefill, 3)
    gate.open()
    oracle = Oracle(tiny_model)
    for i, task in enumerate(together):
        answer = await task
        assert oracle.first_wrong(prompt(10 + 7 * i, salt=i), [answer.token_id]) is None
        assert to_seconds(answer.queue_time) > 0
        await release(prefill, answer.handle)
    await release(prefill, (await first).handle)


async def test_sampling_depends_on_seed_and_position_only(prefill: Prefill) -> None:
    def sampling(seed: int) -> SamplingParams:
        return SamplingParams(temperature=5.0, seed=seed)

    drawn = []
    for seed in (*range(12), *range(12)):
        answer = await prefill.compute(20, sampling=sampling(seed))
        drawn.append(answer.token_id)
        await release(prefill, answer.handle)
    assert drawn[:12] == drawn[12:]
    assert len(set(drawn)) > 3, "the seed does nothing"


async def test_capabilities_and_health(prefill: Prefill) -> None:
    channel, device = prefill.channels.get(prefill.address), prefill.service.device
    answer = await WorkerServiceStub(channel).GetCapabilities(GetCapabilitiesRequest(), timeout=5)
    facts = answer.capabilities
    assert (facts.worker_id, facts.role, facts.address) == (
        "prefill-0",
        WorkerRole.WORKER_ROLE_PREFILL,
        prefill.address,
    )
    assert (facts.incarnation, facts.block_tokens, facts.context_tokens) == (device.incarnation, BLOCK, 4096)
    assert facts.writable_layout == device.layout.fingerprint
    assert list(facts.readable_layouts) == [device.layout.fingerprint]
    for name in SERVICES:
        assert await health(prefill.channels, prefill.address, name)


# What it refuses.


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"token_ids": []}, "token_ids", "the prompt has 0 tokens, must have 1 to 4095"),
        ({"token_ids": [5] * 4096}, "token_ids", "the prompt has 4096 tokens, must have 1 to 4095"),
        ({"token_ids": [3, 259]}, "token_ids", "token id 259 is outside the vocabulary of 259"),
        ({"token_ids": [2**32 - 1]}, "token_ids", "token id 4294967295 is outside"),
        ({"token_ids": [5] * 400}, "token_ids", "a prompt of 400 tokens needs 25 KV blocks, this worker has 24"),
        ({"sampling": SamplingParams(temperature=-1)}, "sampling.temperature", "is -1.0, must be between 0 and 100"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "sampling.temperature", "is nan"),
        ({"sampling": SamplingParams(temperature=101)}, "sampling.temperature", "is 101.0"),
        ({"sampling": SamplingParams(top_p=0)}, "sampling.top_p", "is 0.0, must be above 0 and at most 1"),
        ({"sampling": SamplingParams(top_p=1.5)}, "sampling.top_p", "is 1.5"),
    ],
)
async def test_a_request_that_is_wrong(changes: dict[str, Any], field: str, message: str, prefill: Prefill) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message) as raised:
        await prefill.compute([5], **changes)
    assert raised.value.field == field
    await prefill.settled()


async def test_a_foreign_layout(prefill: Prefill) -> None:
    for fingerprint in (b"", b"x" * 32, prefill.service.device.layout.fingerprint[:31]):
        with pytest.raises(errors.LayoutMismatchError, match="this worker writes"):
            await prefill.compute(5, layout_fingerprint=fingerprint)
    await prefill.settled()


async def test_bytes_that_are_no_message(prefill: Prefill) -> None:
    channel: Any = prefill.channels.get(prefill.address)
    for method in (PREFILL, "/zipserve.v1.PrefillService/ReleaseHandle"):
        with pytest.raises(errors.InvalidRequestError, match="not a valid message"), client_errors():
            await channel.unary_unary(method)(b"\xff\xff\xff", timeout=5)
    metrics, labels = prefill.service.metrics, {"method": PREFILL, "reason": "INVALID_REQUEST"}
    await until(lambda: value(metrics, "zipserve_rpcs_total", **labels) == 1, "it is counted")


async def test_a_message_that_is_too_large(prefill: Prefill) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await prefill.stub.Prefill(prefill.request([200] * 5_000_000), timeout=10)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(from_rpc_error(raised.value)) is errors.InvalidRequestError, "trying again would not help"
    await prefill.settled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue_requests_max": 2}, "2 requests wait, the limit is 2"),
        ({"queue_tokens_max": 30}, "20 tokens wait and 20 came, the limit is 30"),
    ],
)
async def test_overload(settings: dict[str, Any], message: str, cluster_workers: Workers) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, **settings)
    gate = Gate(prefill.service.device)
    tasks = [start(prefill, 20)]
    await gate.entered()
    for i in range(int(settings.get("queue_requests_max", 1))):
        tasks.append(start(prefill, 20))
        await queued(prefill, i + 1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await prefill.stub.Prefill(prefill.request(prompt(20)), timeout=5)
    _check_overload(raised.value, message)
    gate.open()
    for task in tasks:
        await release(prefill, (await task).handle)


async def test_a_failing_step_fails_its_own_prompts_only(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    forward = prefill.service.device.engine.forward
    monkeypatch.setattr(prefill.service.device.engine, "forward", fail)
    with pytest.raises(errors.UnavailableError, match="worker's log") as raised:
        await prefill.compute(40)
    assert type(raised.value) is errors.UnavailableError
    assert "luck" not in raised.value.message
    await prefill.settled()
    monkeypatch.setattr(prefill.service.device.engine, "forward", forward)
    await release(prefill, (await prefill.compute(40)).handle)


# Giving a handle back.


async def test_release_handle_frees_at_once_and_any_number_of_times(prefill: Prefill) -> None:
    handle = (await prefill.compute(40)).handle
    for _ in range(3):
        await release(prefill, handle)
        await prefill.settled()


async def test_release_of_a_forged_handle(prefill: Prefill) -> None:
    handle = (await prefill.compute(40)).handle
    forged = KvHandle(claims=handle.claims, mac=bytes(32))
    for bad in (forged, KvHandle()):
        with pytest.raises(errors.HandleForgedError):
            await release(prefill, bad)
    assert (await prefill.load()).leases == 1, "anybody could end another one's lease"
    await release(prefill, handle)


async def test_a_handle_that_nobody_takes_expires(cluster_workers: Workers) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, lease_ttl_s=0.2)
    for _ in range(3):
        await prefill.compute(40)
    assert (await prefill.load()).leases == 3
    await prefill.settled()
    assert value(prefill.service.metrics, "zipserve_kv_leases_expired_total") == 3
    assert value(prefill.service.metrics, "zipserve_kv_leases") == 0
    assert value(prefill.service.metrics, "zipserve_kv_blocks_free") == 24


async def test_freed_slabs_say_so(cluster_workers: Workers) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, prefix_blocks_max=0)
    answer = await prefill.compute(40)
    await release(prefill, answer.handle)
    for ref in claims_of(answer.handle).refs:
        assert bytes(prefill.service.device.slab_view(SlabKind(ref.kind), ref.slab)[:HEADER_BYTES]) == bytes(
            HEADER_BYTES
        )


# A caller that goes away, or whose time runs out: by cancelling, by its own deadline, and by the worker's default one.

WAYS = ways(0.8)


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_while_queued(
    go: GoAway, options: dict[str, Any], error: type[BaseException], settings: dict[str, Any], cluster_workers: Workers
) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, **settings)
    gate = Gate(prefill.service.device)
    first = start(prefill, 20, timeout_s=20.0)
    await gate.entered()
    task = start(prefill, 40, **options)
    await queued(prefill, 1)
    go(task)
    with pytest.raises(error):
        await task
    await queued(prefill, 0)
    gate.open()
    if not settings:
        await release(prefill, (await first).handle)
    await asyncio.gather(first, return_exceptions=True)
    await prefill.settled()


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_while_computed(
    go: GoAway, options: dict[str, Any], error: type[BaseException], settings: dict[str, Any], cluster_workers: Workers
) -> None:
    prefill = await cluster_workers.prefill(Fabric().open, **settings)
    gate = Gate(prefill.service.device)
    task = start(prefill, 40, **options)
    await gate.entered()
    go(task)
    with pytest.raises(error):
        await task
    rpcs = prefill.service.metrics.rpcs
    await until(lambda: _total(rpcs) == 1, "the worker knows; an answer sent before would be lost on its way")
    assert prefill.service.load().free_blocks == 22, "its slabs are still being written"
    gate.open()
    await prefill.settled()


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_while_waiting_for_slabs(
    go: GoAway, options: dict[str, Any], error: type[BaseException], settings: dict[str, Any], cluster_workers: Workers
) -> None:
    """And the one behind it, which needs less, gets its turn then: not when somebody else's lease ends."""
    prefill = await cluster_workers.prefill(Fabric().open, kv_blocks=4, **settings)
    holder = await prefill.compute(3 * BLOCK)
    head = start(prefill, prompt(2 * BLOCK, salt=2), **options)
    await queued(prefill, 1)
    behind = start(prefill, prompt(BLOCK, salt=1), timeout_s=5.0 if not settings else None)
    await queued(prefill, 2)
    go(head)
    with pytest.raises(error):
        await head
    if settings:  # the default deadline is that of all requests: it may have just made it, or not
        await asyncio.wait([behind])
    if not settings or behind.exception() is None:
        await release(prefill, (await behind).handle)
    assert prefill.service.load().leases == 1
    await release(prefill, holder.handle)


@pytest.mark.parametrize("turns", range(4))
async def test_goes_away_when_the_answer_is_ready(turns: int, cluster_workers: Workers) -> None:
    """An answer that was sent to nobody cannot be noticed: this is what a lease is for."""
    prefill = await cluster_workers.prefill(Fabric().open, lease_ttl_s=0.2)
    gate = Gate(prefill.service.device)
    task = start(prefill, 40)
    await gate.entered()
    gate.open()
    await until(lambda: prefill.service.load().leases == 1, "the answer is ready")
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await prefill.settled()


async def test_goes_away_between_the_result_and_its_answer(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close as it gets: the result is there, its caller has not seen it yet."""
    source, issue = prefill.service.source, prefill.service.source.issue
    task = asyncio.create_task(
        prefill.service.worker.prefill("r", prompt(40), [Sampler(Sampling(temperature=0))], Deadline(20))
    )

    def issue_and_cancel(*args: Any) -> KvHandle:
        handle = issue(*args)
        asyncio.get_running_loop().call_soon(task.cancel)
        return handle

    monkeypatch.setattr(source, "issue", issue_and_cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    await prefill.settled()


async def test_a_deadline_that_has_passed_on_arrival(prefill: Prefill) -> None:
    with pytest.raises(errors.DeadlineError):
        await prefill.compute(40, timeout_s=0.0)
    await prefill.settled()


# Going away itself.


async def test_drain_waits_for_prompts_and_pulls_and_refuses_new_ones(
    tiny_model: Path, redis_url: str, cluster: str
) -> None:
    async with workers(tiny_model, redis_url, cluster) as started:
        ended = asyncio.Event()
        handles: list[KvHandle] = []
        draining = asyncio.create_task(_drain(started, ended, handles))
        await asyncio.wait([draining, asyncio.create_task(ended.wait())], return_when=asyncio.FIRST_COMPLETED)
        await draining
    assert len(handles) == 1


async def _drain(started: Workers, ended: asyncio.Event, handles: list[KvHandle]) -> None:
    context = started.a_prefill(Fabric().open, drain_s=20.0, check=False)
    prefill = await context.__aenter__()
    gate = Gate(prefill.service.device)
    computing = start(prefill, 40)
    await gate.entered()
    leaving = asyncio.create_task(context.__aexit__(None, None, None))
    await until(lambda: prefill.service.load().draining, "it drains")
    for name in SERVICES:
        assert not await health(prefill.channels, prefill.address, name)
    with pytest.raises(errors.DrainingError, match="going away"):
        await prefill.compute(40)
    gate.open()
    answer = await computing
    handles.append(answer.handle)
    await until(lambda: not prefill.service.load().running_requests, "nothing is computed any more")
    assert not leaving.done(), "it left before its handle was pulled"
    lease_id = claims_of(answer.handle).lease_id
    assert prefill.service.source._leases.renew(lease_id, time.monotonic())
    await release(prefill, answer.handle)
    async with asyncio.timeout(3.0):
        await leaving
    ended.set()
    with pytest.raises(errors.WorkerLostError):
        await prefill.compute(40, timeout_s=3.0)


async def test_drain_ends_after_its_time(cluster_workers: Workers) -> None:
    started_s = time.monotonic()
    async with cluster_workers.a_prefill(Fabric().open, drain_s=0.2, check=False) as prefill:
        await prefill.compute(40)
    assert 0.2 <= time.monotonic() - started_s < 5.0


async def test_a_port_that_is_taken(cluster_workers: Workers, prefill: Prefill) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {prefill.address}"):
        await cluster_workers.prefill(Fabric().open, listen=prefill.address, worker_id="prefill-1")


def _total(counter: Counter) -> float:
    samples = [sample for metric in counter.collect() for sample in metric.samples]
    return sum(s.value for s in samples if s.name.endswith("_total") and s.labels["method"] == PREFILL)


def _check_overload(raised: grpc.aio.AioRpcError, message: str) -> None:
    assert raised.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.details() == message
    status = rpc_status.from_call(raised)  # type: ignore[arg-type]  # AioRpcError has what it reads
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() > 0
    assert isinstance(from_rpc_error(raised), errors.OverloadedError)
