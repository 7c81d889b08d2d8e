"""Which workers serve a request: filter, score, pick, over plain records.

A worker's own numbers are a heartbeat old, but count the work of all routers; what this router has sent there and not
seen end is fresh, but counts only its own. The larger of the two is taken, so that requests that arrive together see
each other, and one that has just ended is not counted for long. Equal workers take turns.

What a prompt waits for its first token is predicted in tokens that are to be computed before: those that a worker has
waiting, and those of the prompt that it is not expected to find in its cache.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from zipserve.router.counted import counted

WorkerKey = tuple[str, int]
"""Worker id and incarnation: a restarted worker is another one."""

_REMEMBERED_PICKS = 4096
_CERTAINTY = 2.0
"""A worker may turn out to be this many times faster than it says before somebody was called late who was not."""
_NOTHING: Mapping[WorkerKey, int] = MappingProxyType({})


@dataclass(frozen=True)
class Worker:
    """One worker, as far as routing cares."""

    worker_id: str
    incarnation: int
    address: str
    model: str
    revision: str
    context_tokens: int
    readable_layouts: frozenset[bytes] = frozenset()
    writable_layout: bytes = b""
    layout_description: str = ""
    queued_requests: int = 0
    queued_tokens: int = 0
    running_requests: int = 0
    parked_requests: int = 0
    free_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    """As it has measured; 0: not known."""
    block_tokens: int = 0
    """Of the layout that it writes; 0: not known."""
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def key(self) -> WorkerKey:
        """Identity of this life of the worker."""
        return self.worker_id, self.incarnation


@dataclass(frozen=True)
class Pair:
    """Who computes the prompt and who continues it."""

    prefill: Worker
    decode: Worker

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Both."""
        return self.prefill, self.decode


@dataclass(frozen=True)
class Alone:
    """A decode worker that computes the prompt as well."""

    decode: Worker

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The one."""
        return (self.decode,)


@dataclass(frozen=True)
class Need:
    """What a pair of workers must offer."""

    model: str
    revision: str
    tokens: int
    """Tokens of prompt and completion together."""

    def met_by(self, worker: Worker) -> bool:
        """Whether a worker can serve this at all."""
        return (worker.model, worker.revision) == (self.model, self.revision) and worker.context_tokens >= self.tokens


@dataclass
class InFlight:
    """What this router has sent to each worker and not seen end."""

    prefill_tokens: Counter[WorkerKey] = field(default_factory=Counter)
    decode_requests: Counter[WorkerKey] = field(default_factory=Counter)
    _prompts: dict[WorkerKey, Counter[tuple[int, int]]] = field(default_factory=dict)
    """Priority and tokens of each prompt that is being computed."""
    _picks: int = 0
    _last_pick: dict[WorkerKey, int] = field(default_factory=dict)

    @contextmanager
    def prefilling(self, worker: Worker, tokens: int, priority: int = 0) -> Iterator[None]:
        """Counts a prompt while the context is open."""
        prompts = self._prompts.setdefault(worker.key, Counter())
        try:
            with counted(self.prefill_tokens, worker.key, tokens), counted(prompts, (priority, tokens), 1):
                yield
        finally:
            if not prompts:
                self._prompts.pop(worker.key, None)

    def tokens_ahead(self, worker: Worker, tokens: int, priority: int) -> int:
        """Tokens that a prefill worker certainly computes before those of a prompt that would come now: of a higher
        priority, or of the same and not longer; as far as this router has sent them, and the worker has them waiting.
        """
        ahead = sum(
            of_prompt * count
            for (other, of_prompt), count in self._prompts.get(worker.key, {}).items()
            if other > priority or (other == priority and of_prompt <= tokens)
        )
        return min(ahead, worker.queued_tokens)

    @contextmanager
    def decoding(self, worker: Worker, sequences: int = 1) -> Iterator[None]:
        """Counts sequences while the context is open."""
        with counted(self.decode_requests, worker.key, sequences):
            yield

    def picked(self, route: Pair | Alone) -> None:
        """Remembers whose turn it was."""
        self._picks += 1
        for worker in route.workers:
            self._last_pick.pop(worker.key, None)
            self._last_pick[worker.key] = self._picks
        while len(self._last_pick) > _REMEMBERED_PICKS:
            del self._last_pick[next(iter(self._last_pick))]

    def requests_of(self, worker: Worker) -> int:
        """Requests that a decode worker has not ended."""
        here = worker.running_requests + worker.queued_requests + worker.parked_requests
        return max(here, self.decode_requests[worker.key])

    def last_pick(self, worker: Worker) -> int:
        """Number of the last pick of a worker; 0 when it was never picked."""
        return self._last_pick.get(worker.key, 0)


class PrefillScore(NamedTuple):
    """How well a prefill worker suits a prompt; the smallest is the best."""

    failures: int
    """1 if it failed in this request."""
    first_token_tokens: int
    """Tokens to compute before the first token is there."""
    last_pick: int
    worker_id: str


def prefill_scores(
    prefills: Sequence[Worker],
    in_flight: InFlight,
    failed: Collection[WorkerKey] = (),
    to_compute: Mapping[WorkerKey, int] = _NOTHING,
) -> list[PrefillScore]:
    """Scores of prefill workers, in their order.

    Args:
        to_compute: tokens of the prompt that each would have to compute; the same for all where nothing is known.
    """
    return [
        PrefillScore(
            worker.key in failed,
            max(worker.queued_tokens, in_flight.prefill_tokens[worker.key]) + to_compute.get(worker.key, 0),
            in_flight.last_pick(worker),
            worker.worker_id,
        )
        for worker in prefills
    ]


def first_token_s_at_least(
    prefills: Sequence[Worker], need: Need, in_flight: InFlight, priority: int, to_compute: Mapping[WorkerKey, int]
) -> float:
    """Time that any prefill worker will certainly take to the first token of a prompt, in seconds; 0 where one of them
    does not say how fast it is."""

    def seconds(worker: Worker) -> float:
        if not worker.prefill_tokens_per_s:
            return 0.0
        tokens = to_compute.get(worker.key, 0)
        ahead = in_flight.tokens_ahead(worker, tokens, priority)
        return (ahead + tokens) / (_CERTAINTY * worker.prefill_tokens_per_s)

    return min((seconds(worker) for worker in prefills if need.met_by(worker)), default=0.0)


def choose(
    prefills: Sequence[Worker],
    decodes: Sequence[Worker],
    need: Need,
    in_flight: InFlight,
    failed: Collection[WorkerKey] = (),
    to_compute: Mapping[WorkerKey, int] = _NOTHING,
) -> Pair | None:
    """The best pair, or None when there is none.

    Prefill: fewest tokens before the first one, see `prefill_scores`. Decode: fewest outstanding requests, then most
    free blocks. Ties: whose last turn is longest ago, then the id. Workers that `failed` in this request are taken only
    when no others are left.
    """
    prefills = [worker for worker in prefills if need.met_by(worker) and worker.writable_layout]
    best: dict[bytes, Worker] = {}
    for layout in {worker.writable_layout for worker in prefills}:
        readers = [worker for worker in decodes if layout in worker.readable_layouts]
        if alone := choose_alone(readers, need, in_flight, failed):
            best[layout] = alone.decode
    readable = [worker for worker in prefills if worker.writable_layout in best]

    def order(scored: tuple[PrefillScore, Worker]) -> PrefillScore:
        score, worker = scored
        return score._replace(failures=score.failures + (best[worker.writable_layout].key in failed))

    scores = prefill_scores(readable, in_flight, failed, to_compute)
    picked = min(zip(scores, readable, strict=True), key=order, default=None)
    return None if picked is None else Pair(picked[1], best[picked[1].writable_layout])


def choose_alone(
    decodes: Sequence[Worker],
    need: Need,
    in_flight: InFlight,
    failed: Collection[WorkerKey] = (),
    to_compute: Mapping[WorkerKey, int] = _NOTHING,
) -> Alone | None:
    """The best decode worker by itself, or None when there is none: fewest outstanding requests, then fewest tokens to
    compute, then as in `choose`.
    """
    able = [worker for worker in decodes if need.met_by(worker)]

    def order(worker: Worker) -> tuple[int, ...]:
        requests, tokens = in_flight.requests_of(worker), to_compute.get(worker.key, 0)
        return worker.key in failed, requests, tokens, -worker.free_blocks, in_flight.last_pick(worker)

    best = min(able, key=lambda worker: (order(worker), worker.worker_id), default=None)
    return None if best is None else Alone(best)


def missing(prefills: Sequence[Worker] | None, decodes: Sequence[Worker], need: Need) -> str:
    """Why `choose`, or without prefill workers `choose_alone`, finds nobody, for people."""
    for role, workers in (("prefill", prefills), ("decode", decodes)):
        if workers is None:
            continue
        if not workers:
            return f"no {role} worker is alive"
        same = [w for w in workers if (w.model, w.revision) == (need.model, need.revision)]
        if not same:
            others = sorted({f"{w.model}@{w.revision[:12]}" for w in workers})
            return f"no {role} worker serves {need.model}@{need.revision[:12]}, they serve {', '.join(others)}"
        if not any(need.met_by(w) for w in same):
            longest = max(w.context_tokens for w in same)
            return f"no {role} worker takes {need.tokens} tokens, the longest context is {longest}"
    written = sorted({w.layout_description or w.writable_layout.hex()[:12] or "none" for w in prefills or ()})
    return f"no decode worker reads what the prefill workers write (layouts: {', '.join(written)})"
