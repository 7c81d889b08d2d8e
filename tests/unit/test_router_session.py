"""Replay: whatever fails, the client sees every token once, and every handle has exactly one owner at the end."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import (
    BY_REASON,
    BlockCorruptError,
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    LayoutMismatchError,
    LeaseExpiredError,
    NoWorkerError,
    OverloadedError,
    TransferError,
    WorkerLostError,
    ZipserveError,
)
from zipserve.common.kv.holders import Holders
from zipserve.common.metrics import Metrics
from zipserve.common.rpc.channel import Deadline
from zipserve.common.rpc.duration import to_duration
from zipserve.common.sampling import Sampling
from zipserve.router.choice import Choice, Report
from zipserve.router.detokenizer import Detokenizer
from zipserve.router.job import Job
from zipserve.router.policy import InFlight, Need, Worker
from zipserve.router.prefixes import Prefixes
from zipserve.router.session import Rules, Session
from zipserve.router.transcript import Chunk, Transcript
from zipserve.v1.decode_service_pb2 import (
    DecodedTokens,
    DecodeFinished,
    DecodeRequest,
    DecodeResponse,
    EndSequenceRequest,
    Pulled,
)
from zipserve.v1.kv_pb2 import KvHandle
from zipserve.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse
from zipserve.v1.sampling_pb2 import FinishReason

PROMPT = (5, 6, 7)
STOP_ID = 1
STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


def model(position: int) -> int:
    """The token at a position, whoever computes it."""
    return 1000 + position


@dataclass
class Fault:
    """What goes wrong in one call: `error` after `tokens` tokens; before the pull when `tokens` is None."""

    error: ZipserveError | None
    tokens: int | None = None


@dataclass
class FakeWorkers:
    """Workers by script. `prefill_faults` and `decode_faults` are taken from the front, one per call."""

    prefill_count: int = 2
    decode_count: int = 2
    prefill_faults: list[ZipserveError | None] = field(default_factory=list)
    decode_faults: list[Fault | None] = field(default_factory=list)
    tokens_per_event: int = 2
    stop_at: int = 10_000
    """Position at which the model ends the sequence."""
    cancel_at: int = -1
    """Number of the suspension at which the session's task is cancelled."""
    end_without_token: FinishReason.ValueType | None = None
    now_s: float = 0.0
    points: int = 0
    calls: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    handles: dict[bytes, list[str]] = field(default_factory=dict)
    """What became of each handle: taken, released."""
    decoding: int = 0
    lost: list[str] = field(default_factory=list)
    arrivals: dict[float, list[Worker]] = field(default_factory=dict)
    extra: list[Worker] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)

    def prefills(self) -> list[Worker]:
        return [fake_worker(f"p{i}", busy=i) for i in range(self.prefill_count)] + self.extra

    def decodes(self) -> list[Worker]:
        return [fake_worker(f"d{i}", busy=i) for i in range(self.decode_count)]

    async def wait_for_change(self, timeout_s: float) -> None:
        assert timeout_s > 0
        self.waits_s.append(timeout_s)
        await self._point()
        arrival = min((at for at in self.arrivals if self.now_s < at <= self.now_s + timeout_s), default=None)
        self.now_s = self.now_s + timeout_s if arrival is None else arrival
        self.extra += self.arrivals.pop(arrival, []) if arrival is not None else []

    async def prefill(self, worker: Worker, request: PrefillRequest, timeout_s: float) -> PrefillResponse:
        assert timeout_s > 0
        self.calls.append(worker.worker_id)
        self.prompts.append(list(request.token_ids))
        assert request.layout_fingerprint == b"A"
        await self._point()
        if self.prefill_faults and (error := self.prefill_faults.pop(0)):
            raise error
        handle = KvHandle(claims=f"handle {len(self.handles)}".encode())
        self.handles[handle.claims] = []
        return PrefillResponse(
            token_id=self._token(len(request.token_ids)),
            handle=handle,
            queue_time=to_duration(0.25),
            compute_time=to_duration(0.5),
        )

    async def decode(
        self, worker: Worker, request: DecodeRequest, timeout_s: float
    ) -> AsyncGenerator[DecodeResponse, None]:
        assert timeout_s > 0
        assert request.max_new_tokens >= 1
        self.calls.append(worker.worker_id)
        self.handles[request.handle.claims].append("taken")
        fault = self.decode_faults.pop(0) if self.decode_faults else None
        self.decoding += 1
        try:
            await self._point()
            if fault and fault.tokens is None and fault.error:
                raise fault.error
            yield DecodeResponse(pulled=Pulled(bytes=1000, blocks=2, transfer_time=to_duration(0.125)))
            made = 0
            position = len(self.prompts[-1]) + 1
            while made < request.max_new_tokens:
                await self._point()
                if fault is not None and fault.tokens is not None and made >= fault.tokens:
                    if fault.error is None:
                        return
                    raise fault.error
                if self.end_without_token is not None and made >= 2:
                    yield DecodeResponse(finished=DecodeFinished(reason=self.end_without_token))
                    return
                size = min(self.tokens_per_event, request.max_new_tokens - made)
                ids = [self._token(position + i) for i in range(size)]
                yield DecodeResponse(tokens=DecodedTokens(position=position, token_ids=ids))
                position, made = position + size, made + size
                if STOP_ID in ids:
                    break
            await self._point()
            reason = STOP if position > self.stop_at else LENGTH
            yield DecodeResponse(finished=DecodeFinished(reason=reason))
        finally:
            self.decoding -= 1

    def release(self, worker: Worker, handle: KvHandle, request_id: str) -> None:
        self.handles[handle.claims].append("released")

    def end_sequence(self, worker: Worker, request: EndSequenceRequest, request_id: str) -> None:
        raise AssertionError("the only sequence of a call ends with it")

    def report_lost(self, worker: Worker) -> None:
        self.lost.append(worker.worker_id)

    def _token(self, position: int) -> int:
        return STOP_ID if position == self.stop_at else model(position)

    async def _point(self) -> None:
        self.points += 1
        if self.points == self.cancel_at:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await asyncio.sleep(0)


def fake_worker(name: str, busy: int = 0) -> Worker:
    """`busy` makes the first one the best, until it has failed."""
    layout = b"A" if name[0] == "p" else b""
    worker = Worker(name, 1, f"{name}:1", "m", "r", 10_000, frozenset({b"A"}), layout)
    return replace(worker, queued_tokens=1000 * busy, running_requests=10 * busy)


@dataclass
class Run:
    """One session over fake workers."""

    workers: FakeWorkers
    max_tokens: int = 12
    stop: tuple[str, ...] = ()
    rules: Rules = field(default_factory=lambda: Rules(worker_wait_s=30.0, attempts_max=8, backoff_s=0.0))
    deadline_s: float = 60.0
    cancel_after_chunks: int = -1
    chunks: list[Chunk] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.in_flight = InFlight()
        self.prefixes = Prefixes(1000, Holders(), 0.0)
        self.deadline = Deadline(self.deadline_s)
        job = Job("r1", PROMPT, Sampling(seed=1), self.max_tokens, self.stop, frozenset({STOP_ID}))
        self.transcript = Transcript(job, Detokenizer(lambda ids: "".join(f"<{i}>" for i in ids), ()))
        self.choice = Choice(job, self.transcript)
        self.session = self.session_of([self.choice])

    def session_of(self, choices: list[Choice]) -> Session:
        return Session(
            choices,
            Need("m", "r", self.choice.job.tokens_max),
            self.workers,
            self.in_flight,
            self.prefixes,
            self.deadline,
            self.rules,
            self.metrics,
            now=lambda: self.workers.now_s,
        )

    @property
    def report(self) -> Report:
        return self.choice.report

    async def go(self) -> None:
        async with aclosing(self.session.run()) as chunks:
            async for chunk in chunks:
                assert isinstance(chunk, Chunk)
                self.chunks.append(chunk)
                if len(self.chunks) == self.cancel_after_chunks:
                    raise asyncio.CancelledError

    def run(self) -> "Run":
        asyncio.run(self.go())
        return self

    def fails(self, error: type[BaseException]) -> BaseException:
        with pytest.raises(error) as caught:
            asyncio.run(self.go())
        return caught.value

    @property
    def token_ids(self) -> list[int]:
        """What the client has, checked to be without gap or repetition."""
        ids: list[int] = []
        for chunk in self.chunks:
            assert chunk.index == len(ids)
            assert chunk or self.transcript.finish is not None
            ids += chunk.token_ids
        return ids

    def check_nothing_is_left(self) -> None:
        assert not self.in_flight.prefill_tokens
        assert not self.in_flight.decode_requests
        assert self.workers.decoding == 0
        for what in self.workers.handles.values():
            # a handle taken by a worker that is lost before its pull has to be released beside
            assert what in (["taken"], ["released"], ["taken", "released"])


def expected(count: int, start: int = len(PROMPT)) -> list[int]:
    return [model(position) for position in range(start, start + count)]


REPLAYABLE = [cls for cls in BY_REASON.values() if cls.replayable]


def test_without_faults() -> None:
    run = Run(FakeWorkers()).run()
    assert run.token_ids == expected(12)
    assert run.chunks[0].token_ids == (model(3),)  # the first token does not wait for the second
    assert (run.transcript.finish, run.report.replays) == (LENGTH, 0)
    assert run.workers.calls == ["p0", "d0"]
    assert list(run.workers.handles.values()) == [["taken"]]
    run.check_nothing_is_left()


def test_report_adds_up_over_attempts() -> None:
    run = Run(FakeWorkers(decode_faults=[Fault(WorkerLostError("gone"), tokens=4)])).run()
    report = run.report
    assert (report.queue_s, report.prefill_s, report.transfer_s) == (0.5, 1.0, 0.25)
    assert (report.kv_bytes, report.kv_blocks) == (2000, 4)
    assert report.kv_tokens == len(PROMPT) + (len(PROMPT) + 5)
    assert (report.replays, report.prefill_worker, report.decode_worker) == (1, "p0", "d1")


@pytest.mark.parametrize("error", REPLAYABLE, ids=lambda cls: cls.reason)
@pytest.mark.parametrize("where", ["prefill", "before the pull", "before a token", "in the middle", "silently"])
def test_one_failure_is_invisible(error: type[ZipserveError], where: str) -> None:
    fault = error("it broke")
    workers = FakeWorkers()
    match where:
        case "prefill":
            workers.prefill_faults = [fault]
        case "before the pull":
            workers.decode_faults = [Fault(fault)]
        case "before a token":
            workers.decode_faults = [Fault(fault, tokens=0)]
        case "in the middle":
            workers.decode_faults = [Fault(fault, tokens=4)]
        case "silently":
            workers.decode_faults = [Fault(None, tokens=2)]
            error = WorkerLostError
    run = Run(workers).run()
    assert run.token_ids == expected(12)
    assert run.report.replays == 1
    assert run.metrics.replays.labels(error.reason)._value.get() == 1
    assert bool(run.workers.lost) == issubclass(error, WorkerLostError)
    if where == "before the pull":  # whether or not the worker has taken it
        assert next(iter(run.workers.handles.values())) == ["taken", "released"]
    # the replay prefills what the client has already
    assert run.workers.prompts[-1] == [*PROMPT, *expected(len(run.workers.prompts[-1]) - 3)]
    # and goes to another worker than the one that failed
    failed = 0 if where == "prefill" else 1
    assert run.workers.calls[failed] not in run.workers.calls[failed + 1 :]
    run.check_nothing_is_left()


FAULTS = st.none() | st.builds(
    Fault, st.none() | st.sampled_from(REPLAYABLE).map(lambda cls: cls("x")), st.none() | st.integers(0, 5)
)


@given(
    st.lists(st.none() | st.sampled_from(REPLAYABLE).map(lambda cls: cls("x")), max_size=6),
    st.lists(FAULTS, max_size=6),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(3, 30),
    st.integers(-1, 40),
    st.integers(-1, 15),
)
def test_any_faults(
    prefill_faults: list[ZipserveError | None],
    decode_faults: list[Fault | None],
    tokens_per_event: int,
    max_tokens: int,
    stop_at: int,
    cancel_at: int,
    cancel_after_chunks: int,
) -> None:
    workers = FakeWorkers(
        prefill_faults=prefill_faults,
        decode_faults=decode_faults,
        tokens_per_event=tokens_per_event,
        stop_at=stop_at,
        cancel_at=cancel_at,
    )
    rules = Rules(worker_wait_s=30.0, attempts_max=20, backoff_s=0.0)
    run = Run(workers, max_tokens=max_tokens, rules=rules, cancel_after_chunks=cancel_after_chunks)
    length = min(max_tokens, stop_at - len(PROMPT) + 1)
    full = expected(length)
    if stop_at - len(PROMPT) < max_tokens:
        full[-1] = STOP_ID
    cancelled = False
    try:
        run.run()
    except asyncio.CancelledError:
        cancelled = True
    assert cancelled or run.transcript.finish is not None
    assert run.token_ids == full[: len(run.token_ids)]
    if not cancelled:
        assert run.token_ids == full
        assert run.transcript.finish == (STOP if full[-1] == STOP_ID else LENGTH)
    run.check_nothing_is_left()


@pytest.mark.parametrize(("max_tokens", "stop_at", "finish"), [(1, 99, LENGTH), (5, 3, STOP)])
def test_ended_by_the_first_token(max_tokens: int, stop_at: int, finish: FinishReason.ValueType) -> None:
    run = Run(FakeWorkers(stop_at=stop_at), max_tokens=max_tokens).run()
    assert (len(run.token_ids), run.transcript.finish) == (1, finish)
    assert list(run.workers.handles.values()) == [["released"]]
    assert run.workers.calls == ["p0"]


def test_a_stop_string_cancels_the_decode_at_once() -> None:
    run = Run(FakeWorkers(tokens_per_event=3), stop=("<1005>",)).run()
    assert run.token_ids == expected(3)
    assert "".join(chunk.text for chunk in run.chunks) == "<1003><1004>"
    assert run.transcript.finish == STOP
    assert run.workers.points == 3  # prefill, decode's start, its first event: nothing was read after it
    run.check_nothing_is_left()


def test_the_end_of_a_sequence_is_read_to_its_end() -> None:
    run = Run(FakeWorkers(), max_tokens=3).run()
    assert run.workers.points == 4  # the last one is before `finished`


def test_a_lost_end_of_stream_does_not_matter_after_the_last_token() -> None:
    run = Run(FakeWorkers(decode_faults=[Fault(WorkerLostError("gone"), tokens=2)]), max_tokens=3).run()
    assert (run.token_ids, run.report.replays) == (expected(3), 0)


def test_decode_may_end_a_sequence_without_a_token() -> None:
    run = Run(FakeWorkers(end_without_token=LENGTH)).run()
    assert (run.token_ids, run.transcript.finish) == (expected(3), LENGTH)


def test_an_end_without_reason_is_a_defect() -> None:
    run = Run(FakeWorkers(end_without_token=FinishReason.FINISH_REASON_UNSPECIFIED))
    assert "without a reason" in str(run.fails(InternalError))


def test_a_token_at_the_wrong_position_is_a_defect() -> None:
    class Repeating(FakeWorkers):
        async def decode(
            self, worker: Worker, request: DecodeRequest, timeout_s: float
        ) -> AsyncGenerator[DecodeResponse, None]:
            self.handles[request.handle.claims].append("taken")
            for position in (4, 5, 5):
                yield DecodeResponse(tokens=DecodedTokens(position=position, token_ids=[model(position)]))

    run = Run(Repeating())
    assert "from position 5 on, expected 6" in str(run.fails(InternalError))
    assert run.token_ids == expected(3)
    run.check_nothing_is_left()


@pytest.mark.parametrize("error", [InvalidRequestError, DeadlineError, InternalError])
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_an_error_that_no_replay_helps(error: type[ZipserveError], where: str) -> None:
    workers = FakeWorkers()
    if where == "prefill":
        workers.prefill_faults = [error("no")]
    else:
        workers.decode_faults = [Fault(error("no"), tokens=2)]
    run = Run(workers)
    assert str(run.fails(error)) == "no"
    assert run.report.replays == 0
    run.check_nothing_is_left()


def test_a_reader_that_leaves_before_the_pull_releases_the_handle() -> None:
    """The call may never have left."""
    run = Run(FakeWorkers(cancel_at=2))
    run.fails(asyncio.CancelledError)
    assert run.workers.calls == ["p0", "d0"]
    assert list(run.workers.handles.values()) == [["taken", "released"]]


def test_too_few_first_tokens_are_a_defect() -> None:
    run = Run(FakeWorkers())
    run.session = run.session_of([run.choice, run.choice])
    assert "drew 1 first tokens, not 2" in str(run.fails(InternalError))
    assert list(run.workers.handles.values()) == [["released"]]
    run.check_nothing_is_left()


def test_attempts_without_progress_are_bounded() -> None:
    """A first token per attempt is no progress: a handoff that never works must not become a prefill per token."""
    run = Run(FakeWorkers(decode_faults=[Fault(LayoutMismatchError(f"no {i}")) for i in range(20)]), max_tokens=100)
    assert str(run.fails(LayoutMismatchError)) == "no 7"
    assert run.token_ids == expected(8)
    assert run.report.replays == 7
    run.check_nothing_is_left()


def test_progress_resets_the_bound() -> None:
    faults: list[Fault | None] = [Fault(WorkerLostError("gone"), tokens=2) for _ in range(20)]
    run = Run(FakeWorkers(decode_faults=faults), max_tokens=100).run()
    assert run.token_ids == expected(100)
    assert run.report.replays == 20


@pytest.mark.parametrize("error", [TransferError, LeaseExpiredError, BlockCorruptError])
def test_a_failed_handoff_avoids_both_ends(error: type[ZipserveError]) -> None:
    run = Run(FakeWorkers(decode_faults=[Fault(error("x"))])).run()
    assert run.workers.calls == ["p0", "d0", "p1", "d1"]


def test_an_overloaded_worker_is_avoided() -> None:
    run = Run(FakeWorkers(prefill_faults=[OverloadedError("full", retry_after_s=5)])).run()
    assert run.workers.calls == ["p0", "p1", "d0"]
    assert run.workers.waits_s == []


def test_the_only_worker_is_left_alone_while_it_is_overloaded() -> None:
    workers = FakeWorkers(prefill_count=1, prefill_faults=[OverloadedError("full", retry_after_s=5)])
    run = Run(workers).run()
    assert run.workers.waits_s == [5]
    assert run.token_ids == expected(12)


def test_a_newcomer_ends_the_wait_for_an_overloaded_worker() -> None:
    workers = FakeWorkers(prefill_count=1, prefill_faults=[OverloadedError("full", retry_after_s=5)])
    workers.arrivals = {2.0: [fake_worker("p9")]}
    run = Run(workers).run()
    assert run.workers.calls == ["p0", "p9", "d0"]
    assert run.workers.now_s == 2.0


def test_an_overload_beyond_the_deadline_is_reported_at_once() -> None:
    workers = FakeWorkers(prefill_count=1, prefill_faults=[OverloadedError("full", retry_after_s=500)])
    run = Run(workers)
    run.fails(OverloadedError)
    assert run.workers.waits_s == []
    run.check_nothing_is_left()


def test_draining_is_replayed_but_not_reported_as_lost() -> None:
    run = Run(FakeWorkers(prefill_faults=[DrainingError("bye")])).run()
    assert (run.workers.lost, run.workers.calls) == ([], ["p0", "p1", "d0"])


def test_waits_for_a_worker_to_come() -> None:
    run = Run(FakeWorkers(prefill_count=0, arrivals={12.0: [fake_worker("p7")]})).run()
    assert run.workers.calls == ["p7", "d0"]
    assert run.token_ids == expected(12)


def test_no_worker_names_what_is_missing() -> None:
    run = Run(FakeWorkers(prefill_count=0))
    assert str(run.fails(NoWorkerError)) == "no prefill worker is alive"
    assert sum(run.workers.waits_s) == 30


def test_no_worker_until_the_deadline() -> None:
    class Slow(FakeWorkers):
        async def wait_for_change(self, timeout_s: float) -> None:
            assert timeout_s <= 0.05
            await asyncio.sleep(timeout_s)

    assert "no decode worker" in str(Run(Slow(decode_count=0), deadline_s=0.05).fails(NoWorkerError))


def test_a_passed_deadline_between_prefill_and_decode_releases_the_handle() -> None:
    class Late(FakeWorkers):
        async def prefill(self, worker: Worker, request: PrefillRequest, timeout_s: float) -> PrefillResponse:
            answer = await super().prefill(worker, request, timeout_s)
            run.deadline.at_s = 0.0
            return answer

    run = Run(Late())
    run.fails(DeadlineError)
    assert list(run.workers.handles.values()) == [["released"]]
    run.check_nothing_is_left()


@pytest.mark.parametrize("cancel_at", range(1, 10))
def test_cancel_at_every_wait(cancel_at: int) -> None:
    run = Run(FakeWorkers(cancel_at=cancel_at))
    run.fails(asyncio.CancelledError)
    assert run.workers.points == cancel_at <= Run(FakeWorkers()).run().workers.points
    run.check_nothing_is_left()


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_reader_that_leaves(chunks: int) -> None:
    run = Run(FakeWorkers(), cancel_after_chunks=chunks)
    run.fails(asyncio.CancelledError)
    run.check_nothing_is_left()
    assert list(run.workers.handles.values()) == [["released"] if chunks == 1 else ["taken"]]
