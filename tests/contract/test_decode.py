"""The decode worker beside a real prefill worker: every RPC, every refusal, a request that goes away at every stage,
and reads that go wrong on the way."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from memory_transport import Fabric
from oracle import Oracle
from polling import until
from workers import BLOCK, Decode, Gate, GoAway, Pair, Workers, claims_of, failures, health, prompt, value, ways
from zipserve.common import errors
from zipserve.common.kv.handle import sign
from zipserve.common.kv.layout import SlabKind
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.status import client_errors, from_rpc_error
from zipserve.common.sampling import Sampling
from zipserve.common.transfer import held_lease as held_lease_module
from zipserve.common.transfer import puller as puller_module
from zipserve.common.transfer.held_lease import HeldLease
from zipserve.common.transfer.source import KvSource
from zipserve.common.transport import TransportFactory
from zipserve.common.transport.nixl import NixlTransport
from zipserve.decode.stream import Continuation
from zipserve.engine.sampling import Sampler
from zipserve.v1.decode_service_pb2 import DecodeResponse
from zipserve.v1.kv_pb2 import KvClaims
from zipserve.v1.prefill_service_pb2 import PrefillResponse
from zipserve.v1.sampling_pb2 import FinishReason, SamplingParams
from zipserve.v1.worker_service_pb2 import GetCapabilitiesRequest, WorkerRole
from zipserve.v1.worker_service_pb2_grpc import WorkerServiceStub

SECRET = b"a secret for tests only"
SERVICES = ("", "zipserve.v1.DecodeService", "zipserve.v1.WorkerService")
DECODE = "/zipserve.v1.DecodeService/Decode"


@pytest.fixture
def fabric() -> Fabric:
    return Fabric()


@pytest.fixture
async def pair(cluster_workers: Workers, fabric: Fabric) -> Pair:
    return await cluster_workers.pair(fabric.open)


Events = list[DecodeResponse]
Stage = Callable[[], Awaitable[None]]


def before(monkeypatch: pytest.MonkeyPatch, method: str, stage: Stage) -> None:
    """Awaits `stage` at the start of every call of a method of KvTransferService, on workers that start from now on."""
    original = getattr(KvSource, method)

    async def staged(self: KvSource, request: Any, context: Any) -> Any:
        await stage()
        return await original(self, request, context)

    monkeypatch.setattr(KvSource, method, staged)


def start(decode: Decode, prefilled: PrefillResponse, tokens: int = 8, **options: Any) -> "asyncio.Task[Events]":
    return asyncio.create_task(decode.events(prefilled, tokens, **options))


async def queued(decode: Decode, count: int) -> None:
    await until(lambda: decode.service.load().queued_requests == count, f"{count} sequences wait")


# What it answers.


@pytest.mark.parametrize("open_transport", [None, NixlTransport], ids=["memory", "nixl"])
async def test_tokens_are_right(
    open_transport: TransportFactory | None, cluster_workers: Workers, fabric: Fabric, tiny_model: Path
) -> None:
    """With and without a tail, and over block borders while decoding."""
    pair, oracle = await cluster_workers.pair(open_transport or fabric.open), Oracle(tiny_model)
    for tokens in (1, 15, 16, 17, 32, 40, 129):
        first, rest = await pair.hand_over(tokens, 35)
        assert len(rest) == 35
        assert oracle.first_wrong(prompt(tokens), [first.token_id, *rest]) is None, f"after {tokens} tokens"


async def test_what_was_pulled(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(40)
    events = await pair.decode.events(prefilled)
    claims, pulled = claims_of(prefilled.handle), events[0].pulled
    assert (pulled.blocks, pulled.bytes) == (2, sum(ref.bytes for ref in claims.refs))
    assert events[-1].finished.reason == FinishReason.FINISH_REASON_LENGTH
    metrics = pair.decode.service.metrics
    assert value(metrics, "zipserve_kv_transfer_bytes_total", source="prefill") == pulled.bytes
    assert value(metrics, "zipserve_generated_tokens_total") == 8
    await until(lambda: value(metrics, "zipserve_rpcs_total", method=DECODE, reason="OK") == 1, "it is counted")
    source = pair.prefill.service.metrics
    released = "/zipserve.v1.KvTransferService/ReleaseLease"
    await until(lambda: value(source, "zipserve_rpcs_total", method=released, reason="OK") >= 1, "it is released")
    assert value(source, "zipserve_rpcs_total", method=released, reason="OK") == 1, "it costs a round trip"
    await pair.settled()


async def test_a_stop_token_ends_a_sequence(pair: Pair) -> None:
    _, tokens = await pair.hand_over(40, 12)
    again = await pair.prefill.compute(40)
    events = await pair.decode.events(again, 12, stop_token_ids=[tokens[4], 2**32 - 1])
    got = [token for event in events for token in event.tokens.token_ids]
    assert got == tokens[: tokens.index(tokens[4]) + 1]
    assert events[-1].finished.reason == FinishReason.FINISH_REASON_STOP


async def test_sequences_together_are_those_alone(pair: Pair, tiny_model: Path) -> None:
    prompts = [prompt(10 + 9 * i, salt=i) for i in range(4)]
    prefilled = [await pair.prefill.compute(token_ids) for token_ids in prompts]
    answers = await asyncio.gather(*(pair.decode.tokens(one, 20 + i) for i, one in enumerate(prefilled)))
    oracle = Oracle(tiny_model)
    for i, (token_ids, one, tokens) in enumerate(zip(prompts, prefilled, answers, strict=True)):
        assert len(tokens) == 20 + i
        assert oracle.first_wrong(token_ids, [one.token_id, *tokens]) is None


async def test_positions_are_right_when_the_reader_is_slow(pair: Pair) -> None:
    """All tokens are made before the first is taken."""
    prefilled = await pair.prefill.compute(40)
    call = pair.decode.stub.Decode(pair.decode.request(prefilled, 30), timeout=20)
    metrics = pair.decode.service.metrics
    await until(lambda: value(metrics, "zipserve_generated_tokens_total") == 30, "all tokens are made")
    await until(lambda: pair.decode.service.load().free_blocks == 24, "their slabs are free, though nobody has read")
    positions = itertools.count(41)
    async for event in call:
        for i, _ in enumerate(event.tokens.token_ids):
            assert event.tokens.position + i == next(positions)
    assert next(positions) == 71


async def test_a_replay_draws_the_same_tokens(pair: Pair) -> None:
    """From the prompt and what was drawn before: by seed and position."""
    sampling = SamplingParams(temperature=3.0, top_p=0.9, seed=77)
    first = await pair.prefill.compute(40, sampling=sampling)
    tokens = await pair.decode.tokens(first, 20, sampling=sampling)
    so_far = [*prompt(40), first.token_id, *tokens[:7]]
    again = await pair.prefill.compute(so_far, sampling=sampling)
    assert again.token_id == tokens[7]
    assert await pair.decode.tokens(again, 12, sampling=sampling) == tokens[8:]


async def test_its_face(pair: Pair) -> None:
    decode = pair.decode
    answer = await WorkerServiceStub(decode.channels.get(decode.address)).GetCapabilities(
        GetCapabilitiesRequest(), timeout=5
    )
    facts, fingerprint = answer.capabilities, decode.service.device.layout.fingerprint
    assert (facts.worker_id, facts.role, facts.address) == ("decode-0", WorkerRole.WORKER_ROLE_DECODE, decode.address)
    assert (list(facts.readable_layouts), facts.writable_layout) == ([fingerprint], b"")
    for name in SERVICES:
        assert await health(decode.channels, decode.address, name)


# What it refuses. The handle is released at once in all these cases but where it says nothing that can be believed.


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens", "max_new_tokens is 0, must be at least 1"),
        ({"max_new_tokens": 4057}, "max_new_tokens", "40 tokens and 4057 new ones exceed the context of 4096"),
        ({"max_new_tokens": 2**32 - 1}, "max_new_tokens", "exceed the context"),
        ({"max_new_tokens": 400}, "max_new_tokens", "a sequence of 440 tokens needs 27 KV blocks, this worker has 24"),
        ({"token_id": 259}, "token_id", "token id 259 is outside the vocabulary of 259"),
        ({"sampling": SamplingParams(temperature=-1)}, "sampling.temperature", "is -1.0"),
        ({"sampling": SamplingParams(top_p=2)}, "sampling.top_p", "is 2.0"),
    ],
)
async def test_a_request_that_is_wrong(changes: dict[str, Any], field: str, message: str, pair: Pair) -> None:
    prefilled = await pair.prefill.compute(40)
    raised = await pair.decode.refused(prefilled, errors.InvalidRequestError, **changes)
    assert isinstance(raised, errors.InvalidRequestError)
    assert message in raised.message
    assert raised.field == field
    pair.prefill.service.source.release_handle(prefilled.handle)


def resigned(prefilled: PrefillResponse, change: Callable[[KvClaims], None]) -> PrefillResponse:
    """A handle whose claims were changed by somebody who knows the secret: another version of us."""
    claims = claims_of(prefilled.handle)
    change(claims)
    return PrefillResponse(token_id=prefilled.token_id, handle=sign(claims, SECRET))


def _set(path: str, new: Any) -> Callable[[KvClaims], None]:
    def change(claims: KvClaims) -> None:
        target: Any = claims
        *parents, name = path.split(".")
        for parent in parents:
            target = target[int(parent)] if parent.lstrip("-").isdigit() else getattr(target, parent)
        setattr(target, name, new)

    return change


def _drop(index: int) -> Callable[[KvClaims], None]:
    return lambda claims: claims.refs.__delitem__(index)


def _empty(claims: KvClaims) -> None:
    del claims.refs[:]
    claims.tokens = 0


LIES = [
    _set("layout_fingerprint", b"x" * 32),
    _set("layout_fingerprint", b""),
    _set("tokens", 41),
    _set("tokens", 0),
    _set("refs.0.tokens", 15),
    _set("refs.0.bytes", 1),
    _set("refs.0.bytes", 1 << 60),
    _set("refs.1.start_position", 0),
    _set("refs.0.kind", 0),
    _set("refs.0.kind", 2),
    _set("refs.2.kind", 3),
    _set("refs.2.kind", 1),
    _set("refs.2.tokens", 0),
    _set("refs.2.tokens", 16),
    _drop(0),
    _drop(-1),
    _empty,
]


async def test_a_signed_handle_that_does_not_add_up(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(40)
    for count, lie in enumerate(LIES, start=1):
        await pair.decode.refused(resigned(prefilled, lie), errors.LayoutMismatchError)
        assert failures(pair.decode.service.metrics) == {"LAYOUT_MISMATCH": count}
    assert len(await pair.decode.tokens(prefilled)) == 8


@pytest.mark.parametrize("slab", [24, 2**32 - 1])
async def test_a_signed_handle_beyond_the_arena(slab: int, pair: Pair, fabric: Fabric) -> None:
    prefilled = await pair.prefill.compute(40)
    await pair.decode.refused(resigned(prefilled, _set("refs.0.slab", slab)), errors.LayoutMismatchError)
    assert fabric.reads == 0
    await pair.settled()


async def test_a_worker_that_nobody_knows(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(40)
    raised = await pair.decode.refused(resigned(prefilled, _set("worker_id", "nobody")), errors.TransferError)
    assert "worker nobody is not in the registry" in str(raised)
    pair.prefill.service.source.release_handle(prefilled.handle)


async def test_a_lease_that_was_never_given(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(40)
    await pair.decode.refused(resigned(prefilled, _set("lease_id", b"x" * 16)), errors.LeaseExpiredError)
    pair.prefill.service.source.release_handle(prefilled.handle)


async def test_a_handle_is_good_once(pair: Pair) -> None:
    prefilled, _ = await pair.hand_over(40)
    await pair.decode.refused(prefilled, errors.LeaseExpiredError)
    await pair.settled()


async def test_bytes_that_are_no_message(pair: Pair) -> None:
    channel: Any = pair.decode.channels.get(pair.decode.address)
    call = channel.unary_stream(DECODE)(b"\xff\xff\xff", timeout=5)
    with pytest.raises(errors.InvalidRequestError, match="not a valid message"), client_errors():
        await call.read()


async def test_a_message_that_is_too_large(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(40)
    call = pair.decode.stub.Decode(pair.decode.request(prefilled, stop_token_ids=[200] * 5_000_000), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        _ = [event async for event in call]
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(await pair.decode.tokens(prefilled)) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue_requests_max": 2}, "2 sequences wait, the limit is 2"),
        ({"queue_tokens_max": 50}, "sequences of 28 tokens wait and one of 28 came, the limit is 50"),
    ],
)
async def test_overload(settings: dict[str, Any], message: str, cluster_workers: Workers, fabric: Fabric) -> None:
    pair = await cluster_workers.pair(fabric.open, decode={"sequences_max": 1, **settings})
    gate = Gate(pair.decode.service.device)
    tasks = [start(pair.decode, await pair.prefill.compute(20))]
    await gate.entered()
    for i in range(int(settings.get("queue_requests_max", 1))):
        tasks.append(start(pair.decode, await pair.prefill.compute(20)))
        await queued(pair.decode, i + 1)
    refused = await pair.prefill.compute(20)
    call = pair.decode.stub.Decode(pair.decode.request(refused), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    _check_overload(raised.value, message)
    await until(lambda: pair.prefill.service.load().leases == len(tasks) - 1, "the refused handle is released")
    gate.open()
    for task in tasks:
        assert (await task)[-1].finished.reason == FinishReason.FINISH_REASON_LENGTH


async def test_a_failing_step_fails_its_own_sequences_only(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pair.decode.service.device.engine
    forward, calls = engine.forward, itertools.count()

    def fail_third(*args: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("out of luck")
        return forward(*args)

    monkeypatch.setattr(engine, "forward", fail_third)
    prefilled = await pair.prefill.compute(40)
    events: Events = []
    call = pair.decode.stub.Decode(pair.decode.request(prefilled), timeout=10)

    async def read() -> None:
        async for event in call:
            events.append(event)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await read()
    assert type(from_rpc_error(raised.value)) is errors.UnavailableError
    assert sum(len(event.tokens.token_ids) for event in events) == 2, "what was made before is still good"
    await pair.settled()
    assert len((await pair.hand_over(40))[1]) == 8


# A caller that goes away, or whose time runs out: by cancelling, by its own deadline, and by the worker's default one.

WAYS = ways(1.0)
Options = dict[str, Any]


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_while_waiting_for_slabs(
    go: GoAway,
    options: Options,
    error: type[BaseException],
    settings: Options,
    cluster_workers: Workers,
    fabric: Fabric,
) -> None:
    """The one behind it, which needs less, gets its turn then."""
    pair = await cluster_workers.pair(fabric.open, decode={"kv_blocks": 4, **settings})
    gate = Gate(pair.decode.service.device)
    holder = start(pair.decode, await pair.prefill.compute(2 * BLOCK), BLOCK, timeout_s=20.0)
    await gate.entered()
    head = start(pair.decode, await pair.prefill.compute(2 * BLOCK), 8, **options)
    await queued(pair.decode, 1)
    behind = start(pair.decode, await pair.prefill.compute(10), 8, timeout_s=20.0)
    await queued(pair.decode, 2)
    go(head)
    with pytest.raises(error):
        await head
    await until(lambda: pair.decode.service.load().queued_requests == 0, "the one behind is let in")
    gate.open()
    await asyncio.gather(holder, behind, return_exceptions=bool(settings))
    await pair.settled()


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_while_pulling(
    go: GoAway,
    options: Options,
    error: type[BaseException],
    settings: Options,
    cluster_workers: Workers,
    fabric: Fabric,
) -> None:
    pair = await cluster_workers.pair(fabric.open, decode=settings)
    never = asyncio.Event()
    fabric.faults.before = _waiter(never)
    task = start(pair.decode, await pair.prefill.compute(40), **options)
    await until(lambda: fabric.reads == 1, "the read has begun")
    go(task)
    with pytest.raises(error):
        await task
    await pair.settled()
    fabric.faults.before = type(fabric.faults).before
    if not settings:
        assert len((await pair.hand_over(40))[1]) == 8, "the next pull must find the peer again"


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_while_its_lease_is_released(
    go: GoAway,
    options: Options,
    error: type[BaseException],
    settings: Options,
    cluster_workers: Workers,
    fabric: Fabric,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The release that was on its way when the caller left must still reach the prefill worker, at once."""
    asked = asyncio.Event()

    async def hang_once() -> None:
        if not asked.is_set():
            asked.set()
            await asyncio.Event().wait()

    before(monkeypatch, "ReleaseLease", hang_once)
    pair = await cluster_workers.pair(fabric.open, decode=settings)
    task = start(pair.decode, await pair.prefill.compute(40), **options)
    async with asyncio.timeout(5):
        await asked.wait()
    go(task)
    with pytest.raises(error):
        await task
    await pair.settled()


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_while_streaming(
    go: GoAway,
    options: Options,
    error: type[BaseException],
    settings: Options,
    cluster_workers: Workers,
    fabric: Fabric,
) -> None:
    pair = await cluster_workers.pair(fabric.open, decode={"kv_blocks": 200, **settings})
    _slow_down(pair.decode)
    task = start(pair.decode, await pair.prefill.compute(40), 2000, **options)
    metrics = pair.decode.service.metrics
    await until(lambda: value(metrics, "zipserve_generated_tokens_total") >= 5, "it streams")
    go(task)
    with pytest.raises(error):
        await task
    await pair.settled()
    made = value(metrics, "zipserve_generated_tokens_total")
    assert made < 1000
    assert value(metrics, "zipserve_generated_tokens_total") == made


@pytest.mark.parametrize(("go", "options", "error", "settings"), WAYS)
async def test_goes_away_inside_a_step(
    go: GoAway,
    options: Options,
    error: type[BaseException],
    settings: Options,
    cluster_workers: Workers,
    fabric: Fabric,
) -> None:
    """Its slabs stay its own until the step has ended; its neighbour gets its tokens."""
    pair = await cluster_workers.pair(fabric.open, decode=settings)
    stays_kv, leaves_kv = await pair.prefill.compute(20), await pair.prefill.compute(40)
    gate = Gate(pair.decode.service.device)
    leaves = start(pair.decode, leaves_kv, **options)
    await gate.entered()
    stays = start(pair.decode, stays_kv, timeout_s=20.0)
    go(leaves)
    with pytest.raises(error):
        await leaves
    assert pair.decode.service.load().free_blocks <= 24 - 2
    gate.open()
    results = await asyncio.gather(stays, return_exceptions=True)
    assert settings or not isinstance(results[0], BaseException)
    await pair.settled()


async def test_an_impatient_caller_does_not_stop_the_release(
    cluster_workers: Workers, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled once while pulling, and again while its lease is being given back."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        asked.set()
        await go_on.wait()

    before(monkeypatch, "ReleaseLease", slow)
    pair = await cluster_workers.pair(fabric.open)
    fabric.faults.before = _waiter(asyncio.Event())
    prefilled = await pair.prefill.compute(40)

    async def stream() -> None:
        continuation = Continuation("r", prefilled.token_id, Sampler(Sampling()), 8, frozenset())
        async with pair.decode.service.worker.pulled(prefilled.handle, [continuation], Deadline(20.0)):
            pytest.fail("the read has not ended")

    task = asyncio.create_task(stream())
    await until(lambda: fabric.reads == 1, "the read has begun")
    task.cancel()
    await until(asked.is_set, "the release is on its way")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await pair.settled()


async def test_a_cancellation_at_any_moment_of_closing(pair: Pair) -> None:
    puller = pair.decode.service.puller
    for turns in range(1, 9):  # after none it would not even have begun
        claims = puller.open((await pair.prefill.compute(40)).handle)
        lease = HeldLease(puller, claims, "r")
        closing = asyncio.create_task(lease.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await pair.settled()


async def test_a_stream_that_nobody_reads_any_more_keeps_no_slab(pair: Pair) -> None:
    prefilled = await pair.prefill.compute(40)
    call = pair.decode.stub.Decode(pair.decode.request(prefilled, 30), timeout=20)
    await call.read()
    await pair.settled()
    call.cancel()


# Reads that go wrong on the way. A source that is wrong in itself is in test_handoff_faults.


def _waiter(event: asyncio.Event) -> Stage:
    async def wait() -> None:
        await event.wait()

    return wait


async def refused_once(pair: Pair, prefilled: PrefillResponse, error: type[errors.ZipserveError]) -> None:
    """Refused and counted, and nothing is held afterwards."""
    await pair.decode.refused(prefilled, error)
    expected = {error.reason: 1} if issubclass(error, errors.HandoffError) else {}
    assert failures(pair.decode.service.metrics) == expected
    assert value(pair.decode.service.metrics, "zipserve_generated_tokens_total") == 0
    await pair.settled()


async def test_a_bit_that_flips_on_the_way(pair: Pair, fabric: Fabric) -> None:
    places = list(itertools.product((0, 1, 2), (0, 31, 127, 128, -1)))
    for count, (descriptor, byte) in enumerate(places, start=1):
        fabric.faults.flip = (descriptor, byte, count % 8)
        await pair.decode.refused(await pair.prefill.compute(40), errors.BlockCorruptError)
        assert failures(pair.decode.service.metrics) == {"BLOCK_CORRUPT": count}
    assert value(pair.decode.service.metrics, "zipserve_generated_tokens_total") == 0
    await pair.settled()
    fabric.faults.flip = None
    assert len((await pair.hand_over(40))[1]) == 8


async def test_blocks_that_arrive_in_each_other_s_place(pair: Pair, fabric: Fabric) -> None:
    fabric.faults.swap = True
    await refused_once(pair, await pair.prefill.compute(40), errors.BlockSwappedError)


async def test_a_slab_that_is_written_anew_during_the_read(pair: Pair, fabric: Fabric) -> None:
    """Its first half is old, its second half another sequence's."""
    prefilled = await pair.prefill.compute(BLOCK)
    (ref,) = claims_of(prefilled.handle).refs
    other = await pair.prefill.compute(prompt(BLOCK, salt=3))
    (other_ref,) = claims_of(other.handle).refs
    device = pair.prefill.service.device

    async def overwrite() -> None:
        device.slab_view(SlabKind.BLOCK, ref.slab)[:] = bytes(device.slab_view(SlabKind.BLOCK, other_ref.slab))

    fabric.faults.halfway = overwrite
    pair.prefill.service.source.release_handle(other.handle)
    await refused_once(pair, prefilled, errors.BlockCorruptError)


async def test_a_slab_that_is_freed_during_the_read(pair: Pair, fabric: Fabric) -> None:
    """What had been read was whole; but the lease says whether it may be used."""
    prefilled = await pair.prefill.compute(40)

    async def free() -> None:
        pair.prefill.service.source.release_handle(prefilled.handle)

    fabric.faults.halfway = free
    await refused_once(pair, prefilled, errors.LeaseExpiredError)


async def test_a_lease_that_expires_during_the_read(
    cluster_workers: Workers, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a reader that has fallen silent."""
    monkeypatch.setattr(held_lease_module, "_RENEWALS_PER_TTL", 0.001)
    pair = await cluster_workers.pair(fabric.open, prefill={"lease_ttl_s": 0.3})

    async def wait() -> None:
        await until(lambda: pair.prefill.service.load().leases == 0, "the lease has expired")

    fabric.faults.after = wait
    await refused_once(pair, await pair.prefill.compute(40), errors.LeaseExpiredError)
    assert value(pair.prefill.service.metrics, "zipserve_kv_leases_expired_total") == 1


async def test_a_slow_read_keeps_its_lease(cluster_workers: Workers, fabric: Fabric) -> None:
    pair = await cluster_workers.pair(fabric.open, prefill={"lease_ttl_s": 0.6})
    ended_s = 0.0

    async def wait() -> None:
        nonlocal ended_s
        ended_s = ended_s or time.monotonic() + 1.2
        await until(lambda: time.monotonic() > ended_s, "twice the lease")

    fabric.faults.before = wait
    assert len((await pair.hand_over(40))[1]) == 8


async def test_a_long_queue_keeps_its_lease(cluster_workers: Workers, fabric: Fabric) -> None:
    pair = await cluster_workers.pair(fabric.open, prefill={"lease_ttl_s": 0.6}, decode={"sequences_max": 1})
    gate = Gate(pair.decode.service.device)
    first = start(pair.decode, await pair.prefill.compute(40))
    await gate.entered()
    second = start(pair.decode, await pair.prefill.compute(40))
    await queued(pair.decode, 1)
    until_s = time.monotonic() + 1.2
    await until(lambda: time.monotonic() > until_s, "twice the lease")
    gate.open()
    assert len(await first) > 2
    assert len(await second) > 2


async def test_a_dead_peer(pair: Pair, fabric: Fabric) -> None:
    await until(lambda: fabric.connects == 1, "they are connected")
    fabric.faults.dead = True
    await refused_once(pair, await pair.prefill.compute(40), errors.TransferError)
    fabric.faults.dead = False
    assert len((await pair.hand_over(40))[1]) == 8
    assert fabric.connects > 1, "the peer was not connected anew"


async def test_a_peer_that_falls_silent_during_the_read(
    cluster_workers: Workers, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither delivers nor answers; the request's own deadline is far away."""
    for module in (held_lease_module, puller_module):
        monkeypatch.setattr(module, "_RPC_TIMEOUT_S", 0.2)
    silent = asyncio.Event()

    async def hang_when_silent() -> None:
        if silent.is_set():
            await asyncio.Event().wait()

    async def fall_silent() -> None:
        silent.set()
        await asyncio.Event().wait()

    before(monkeypatch, "RenewLeases", hang_when_silent)
    before(monkeypatch, "ReleaseLease", hang_when_silent)
    pair = await cluster_workers.pair(fabric.open, prefill={"lease_ttl_s": 0.6})
    fabric.faults.before = fall_silent
    started_s = time.monotonic()
    raised = await pair.decode.refused(await pair.prefill.compute(40), errors.TransferError)
    assert time.monotonic() - started_s < 3.0
    assert "does not answer" in str(raised)
    await pair.settled()


@pytest.mark.parametrize(
    ("method", "message"), [("RenewLeases", "does not answer"), ("Connect", "did not answer within 0.2 s")]
)
async def test_a_peer_that_does_not_answer_is_lost_and_no_deadline_has_passed(
    method: str, message: str, cluster_workers: Workers, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router replays after the one, and gives up after the other."""
    for module in (held_lease_module, puller_module):
        monkeypatch.setattr(module, "_RPC_TIMEOUT_S", 0.2)
    before(monkeypatch, method, _waiter(asyncio.Event()))
    fabric.faults.before = _waiter(asyncio.Event())
    pair = await cluster_workers.pair(fabric.open)
    raised = await pair.decode.refused(await pair.prefill.compute(40), errors.TransferError)
    assert message in str(raised)
    await pair.settled()


# All at once.


async def test_a_crowd_that_comes_and_goes(cluster_workers: Workers, tiny_model: Path) -> None:
    """Half of the callers leave at some moment, some handles are never taken: who stays gets the right tokens."""
    pair = await cluster_workers.pair(
        NixlTransport, prefill={"kv_blocks": 12, "lease_ttl_s": 2.0}, decode={"kv_blocks": 14, "kv_tails": 2}
    )
    dice, oracle = random.Random(5), Oracle(tiny_model)
    served = 0

    async def serve(number: int, tokens: int, new: int, is_taken: bool) -> None:
        nonlocal served
        token_ids = prompt(tokens, number)
        prefilled = await pair.prefill.compute(token_ids)
        if is_taken:
            rest = await pair.decode.tokens(prefilled, new)
            assert len(rest) == new
            assert oracle.first_wrong(token_ids, [prefilled.token_id, *rest]) is None
            served += 1

    async def come_and_go(number: int) -> None:
        task = asyncio.create_task(serve(number, dice.randint(1, 90), dice.randint(1, 60), number % 12 != 0))
        if number % 2:
            await asyncio.wait([task], timeout=dice.random() * dice.choice([0.01, 0.1, 0.5]))
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None

    for start_number in range(0, 48, 12):
        await asyncio.gather(*(come_and_go(start_number + i) for i in range(12)))
    assert served >= 20
    await pair.settled()


# Going away itself.


async def test_drain_waits_for_streams_and_refuses_new_ones(cluster_workers: Workers, fabric: Fabric) -> None:
    prefill = await cluster_workers.prefill(fabric.open)
    context = cluster_workers.a_decode(fabric.open, drain_s=20.0, check=False)
    decode = await context.__aenter__()
    one, other = await prefill.compute(40), await prefill.compute(40)
    gate = Gate(decode.service.device)
    stream = start(decode, one)
    await gate.entered()
    leaving = asyncio.create_task(context.__aexit__(None, None, None))
    await until(lambda: decode.service.load().draining, "it drains")
    for name in SERVICES:
        assert not await health(decode.channels, decode.address, name)
    with pytest.raises(errors.DrainingError, match="going away"):
        await decode.events(other)
    assert prefill.service.load().leases == 1, "another worker may take the refused handle"
    assert not leaving.done()
    gate.open()
    assert (await stream)[-1].finished.reason == FinishReason.FINISH_REASON_LENGTH
    async with asyncio.timeout(3.0):
        await leaving
    prefill.service.source.release_handle(other.handle)


async def test_drain_ends_after_its_time_and_frees_what_it_holds(cluster_workers: Workers, fabric: Fabric) -> None:
    """Streams that outlast it are cut, and their leases released."""
    prefill = await cluster_workers.prefill(fabric.open)
    async with cluster_workers.a_decode(fabric.open, drain_s=0.2, check=False, kv_blocks=200) as decode:
        _slow_down(decode)
        streaming = start(decode, await prefill.compute(40), 2000)
        metrics = decode.service.metrics
        await until(lambda: value(metrics, "zipserve_generated_tokens_total") >= 3, "it streams")
        fabric.faults.before = _waiter(asyncio.Event())
        pulling = start(decode, await prefill.compute(40))
        await until(lambda: fabric.reads == 2, "the second one pulls")
    for task in (streaming, pulling):
        with pytest.raises((errors.TransferError, errors.UnavailableError)):
            await task
    await prefill.settled()


def _slow_down(decode: Decode) -> None:
    """So that a stream of 2000 tokens outlasts its test, on any machine."""
    forward = decode.service.device.engine.forward

    def slow(*args: Any) -> Any:
        time.sleep(0.005)
        return forward(*args)

    decode.service.device.engine.forward = slow  # type: ignore[method-assign, assignment]


def _check_overload(raised: grpc.aio.AioRpcError, message: str) -> None:
    assert raised.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.details() == message
    status = rpc_status.from_call(raised)  # type: ignore[arg-type]  # AioRpcError has what it reads
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() > 0
    assert isinstance(from_rpc_error(raised), errors.OverloadedError)
