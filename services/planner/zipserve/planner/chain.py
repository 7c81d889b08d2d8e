"""One chain of pipeline stages, simulated event by event: the compiled heart of the planner.

A chain prefills, decodes, or does both, in which case a stage prefers prompts. Nothing is sampled or cut into time
steps: the clock jumps from one arrival or end of a step to the next, so that a result is exact in double precision. At
equal times arrivals come first, then what was scheduled first; a stage that was woken resumes after whatever was
already due at that instant.

A prompt goes through the stages in the batch that the first one has formed. A decoded sequence goes round the stages
once for each token, in whatever batch the stages find: what waits for one merges. Queues and batches of decode are
linked lists over the requests, with their counts and sums beside them, so that handing a batch on costs nothing but
where its tokens are counted, once in a round.

State lies in few arrays, which are handed on one by one: each costs a compiled call an atomic operation.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_IDLE, _WOKEN, _PREFILL, _DECODE = range(4)
_DOING, _TURN, _DONE = range(3)
"""Of a stage: what it does, the number of the event that ends it, and how many batches of prompts it is done with."""
_FOLLOWING, _CONTEXT, _LEFT, _LATE = range(4)
"""Of a request: the next one in its list, tokens, tokens to come, and whether its first one was late."""
_FIRST, _LAST, _COUNT, _TOKENS = range(4)
"""Of a list: its ends, its length, and the sum of its contexts, each with the token to come. Stage s has two: list 2 s
is what waits for it, list 2 s + 1 what it computes."""
_TURNS, _ARRIVED, _HEAD, _LATE_FIRST, _LATE_TOKENS, _LATE_EITHER = range(6)
"""Counters: events scheduled, requests arrived, requests taken by the first stage, and late ones."""


class StepTime(NamedTuple):
    """What a step takes, in ms, and what it may hold. Constants are of all stages together, which share them evenly."""

    stages: int
    prefill: tuple[float, float, float]
    """Constant, per token, and per squared length, each prompt's length by itself."""
    prefill_hop: float
    """Added by each stage to a batch of prompts."""
    decode_small: tuple[float, float, float]
    """Constant, per token of context with the one to come, and per sequence."""
    decode_large: tuple[float, float, float]
    large_from: int
    """Sequences from which on a batch is large."""
    first_stage: tuple[float, float]
    """Added by the first stage: constant, and per token of context."""
    prefill_tokens_max: int
    decode_tokens_max: int
    """Of contexts, each with the token to come."""


class Goal(NamedTuple):
    """When a run has failed and need not go on. A time is late if it is at its bound or above."""

    first_token_ms: float
    token_ms: float
    late_first_max: int
    late_tokens_max: int
    late_either_max: int


@njit(cache=True, nogil=True)
def run(
    arrivals_ms: Floats,
    prompts: Ints,
    outputs: Ints,
    late: Flags,
    step: StepTime,
    prefills: bool,
    decodes: bool,
    goal: Goal,
) -> tuple[Floats, Floats, bool]:
    """Simulates all requests.

    Args:
        arrivals_ms: never descending.
        prompts: tokens.
        outputs: tokens to decode after the first one, at least 1.
        late: whose first token came late already, on another chain.
        prefills: whether prompts are computed here; if not, a request arrives with its first token.
        decodes: whether sequences are decoded here; if not, a request leaves with its first token.

    Returns:
        When each request had its first and its last token, NaN if it had none, and False if the goal was missed and
        the run was given up.
    """
    count = len(arrivals_ms)
    first_ms, done_ms = np.full(count, np.nan), np.full(count, np.nan)
    requests = np.zeros((count, 4), np.int64)
    requests[:, _CONTEXT], requests[:, _LEFT], requests[:, _LATE] = prompts, outputs, late
    stages, until_ms = np.zeros((step.stages, 3), np.int64), np.full(step.stages, np.inf)
    lists = np.zeros((2 * step.stages, 4), np.int64)
    batch_ends = np.zeros(count, np.int64)
    counters = np.zeros(6, np.int64)
    counters[_LATE_EITHER] = late.sum()
    while _in_reach(counters, goal):
        stage = _next_stage(stages, until_ms)
        arrived = counters[_ARRIVED]
        if arrived < count and arrivals_ms[arrived] <= until_ms[stage]:
            counters[_ARRIVED] += 1
            if not prefills:
                first_ms[arrived] = arrivals_ms[arrived]
                _push(lists, 0, requests, arrived)
            _wake(stages, until_ms, counters, 0, arrivals_ms[arrived])
            continue
        doing, now_ms, last = stages[stage, _DOING], until_ms[stage], stage == step.stages - 1
        if doing == _IDLE:
            return first_ms, done_ms, True
        stages[stage, _DONE] += doing == _PREFILL
        if doing == _PREFILL and last:
            _end_prompts(
                lists,
                requests,
                batch_ends,
                counters,
                stages[stage, _DONE] - 1,
                now_ms,
                arrivals_ms,
                first_ms,
                decodes,
                goal,
            )
        elif doing == _DECODE and last:
            _count_tokens(lists, requests, counters, first_ms, done_ms, outputs, now_ms, goal)
        elif doing == _DECODE:
            _splice(lists, 2 * stage + 2, 2 * stage + 1, requests)
        if not last or lists[0, _COUNT]:
            _wake(stages, until_ms, counters, 0 if last else stage + 1, now_ms)
        _begin_step(stages, until_ms, lists, requests, batch_ends, counters, stage, now_ms, prompts, prefills, step)
    return first_ms, done_ms, False


@njit(cache=True, nogil=True)
def _in_reach(counters: Ints, goal: Goal) -> bool:
    return bool(
        counters[_LATE_FIRST] <= goal.late_first_max
        and counters[_LATE_TOKENS] <= goal.late_tokens_max
        and counters[_LATE_EITHER] <= goal.late_either_max
    )


@njit(cache=True, nogil=True)
def _next_stage(stages: Ints, until_ms: Floats) -> int:
    """Whose event is next; one that is idle, if all are."""
    found = 0
    for stage in range(1, len(until_ms)):
        if until_ms[stage] < until_ms[found] or (
            until_ms[stage] == until_ms[found] and stages[stage, _TURN] < stages[found, _TURN]
        ):
            found = stage
    return found


@njit(cache=True, nogil=True)
def _schedule(stages: Ints, until_ms: Floats, counters: Ints, stage: int, doing: int, at_ms: float) -> None:
    stages[stage, _DOING] = doing
    stages[stage, _TURN] = counters[_TURNS]
    counters[_TURNS] += 1
    until_ms[stage] = at_ms


@njit(cache=True, nogil=True)
def _wake(stages: Ints, until_ms: Floats, counters: Ints, stage: int, now_ms: float) -> None:
    if stages[stage, _DOING] == _IDLE:
        _schedule(stages, until_ms, counters, stage, _WOKEN, now_ms)


@njit(cache=True, nogil=True)
def _begin_step(
    stages: Ints,
    until_ms: Floats,
    lists: Ints,
    requests: Ints,
    batch_ends: Ints,
    counters: Ints,
    stage: int,
    now_ms: float,
    prompts: Ints,
    prefills: bool,
    step: StepTime,
) -> None:
    """The stage takes prompts, if any wait, else sequences, else it rests."""
    done = stages[stage, _DONE]
    if prefills and (counters[_HEAD] < counters[_ARRIVED] if stage == 0 else done < stages[stage - 1, _DONE]):
        took_ms = _take_prompts(batch_ends, counters, stage, done, prompts, step)
        _schedule(stages, until_ms, counters, stage, _PREFILL, now_ms + took_ms)
    elif lists[2 * stage, _COUNT]:
        took_ms = _take_sequences(lists, requests, stage, step)
        _schedule(stages, until_ms, counters, stage, _DECODE, now_ms + took_ms)
    else:
        _schedule(stages, until_ms, counters, stage, _IDLE, np.inf)


@njit(cache=True, nogil=True)
def _take_prompts(batch_ends: Ints, counters: Ints, stage: int, batch: int, prompts: Ints, step: StepTime) -> float:
    """Starts a batch of prompts; returns how long it takes, in ms. Only the first stage forms batches."""
    begin = batch_ends[batch - 1] if batch else 0
    if stage == 0:
        end = begin
        room = step.prefill_tokens_max
        while end < counters[_ARRIVED] and prompts[end] <= room:
            room -= prompts[end]
            end += 1
        batch_ends[batch] = end
        counters[_HEAD] = end
    tokens = 0
    squares = 0
    for request in range(begin, batch_ends[batch]):
        tokens += prompts[request]
        squares += prompts[request] * prompts[request]
    constant, per_token, per_square = step.prefill
    took_ms = (constant + per_token * tokens + per_square * squares) / step.stages + step.prefill_hop
    return took_ms + step.first_stage[0] + step.first_stage[1] * tokens if stage == 0 else took_ms


@njit(cache=True, nogil=True)
def _end_prompts(
    lists: Ints,
    requests: Ints,
    batch_ends: Ints,
    counters: Ints,
    batch: int,
    now_ms: float,
    arrivals_ms: Floats,
    first_ms: Floats,
    decodes: bool,
    goal: Goal,
) -> None:
    """After the last stage the prompts of a batch have their first tokens."""
    for request in range(batch_ends[batch - 1] if batch else 0, batch_ends[batch]):
        first_ms[request] = now_ms
        if now_ms - arrivals_ms[request] >= goal.first_token_ms:
            requests[request, _LATE] = 1
            counters[_LATE_FIRST] += 1
            counters[_LATE_EITHER] += 1
        if decodes:
            _push(lists, 0, requests, request)


@njit(cache=True, nogil=True)
def _take_sequences(lists: Ints, requests: Ints, stage: int, step: StepTime) -> float:
    """Starts a decode step of what waits, from the head on, as far as it fits; returns how long it takes, in ms."""
    queue, batch = 2 * stage, 2 * stage + 1
    if lists[queue, _TOKENS] <= step.decode_tokens_max:
        _splice(lists, batch, queue, requests)
    while lists[queue, _COUNT]:
        request = lists[queue, _FIRST]
        tokens = requests[request, _CONTEXT] + 1
        if lists[batch, _TOKENS] + tokens > step.decode_tokens_max:
            break
        lists[queue, _FIRST] = requests[request, _FOLLOWING]
        lists[queue, _COUNT] -= 1
        lists[queue, _TOKENS] -= tokens
        _push(lists, batch, requests, request)
    count, tokens = lists[batch, _COUNT], lists[batch, _TOKENS]
    constant, per_token, per_sequence = step.decode_small if count < step.large_from else step.decode_large
    took_ms: float = (constant + per_token * tokens + per_sequence * count) / step.stages
    return took_ms + step.first_stage[0] + step.first_stage[1] * (tokens - count) if stage == 0 else took_ms


@njit(cache=True, nogil=True)
def _count_tokens(
    lists: Ints,
    requests: Ints,
    counters: Ints,
    first_ms: Floats,
    done_ms: Floats,
    outputs: Ints,
    now_ms: float,
    goal: Goal,
) -> None:
    """After the last stage every sequence of its batch has one token more; those that are complete leave."""
    batch = len(lists) - 1
    request = lists[batch, _FIRST]
    for _ in range(lists[batch, _COUNT]):
        following = requests[request, _FOLLOWING]
        requests[request, _CONTEXT] += 1
        requests[request, _LEFT] -= 1
        if requests[request, _LEFT]:
            _push(lists, 0, requests, request)
        else:
            done_ms[request] = now_ms
            if (now_ms - first_ms[request]) / outputs[request] >= goal.token_ms:
                counters[_LATE_TOKENS] += 1
                counters[_LATE_EITHER] += 1 - requests[request, _LATE]
        request = following
    lists[batch, _COUNT] = 0
    lists[batch, _TOKENS] = 0


@njit(cache=True, nogil=True)
def _push(lists: Ints, into: int, requests: Ints, request: int) -> None:
    """Appends one sequence to a list."""
    if lists[into, _COUNT]:
        requests[lists[into, _LAST], _FOLLOWING] = request
    else:
        lists[into, _FIRST] = request
    lists[into, _LAST] = request
    lists[into, _COUNT] += 1
    lists[into, _TOKENS] += requests[request, _CONTEXT] + 1


@njit(cache=True, nogil=True)
def _splice(lists: Ints, into: int, what: int, requests: Ints) -> None:
    """Moves a whole list to the end of another."""
    if not lists[what, _COUNT]:
        return
    if lists[into, _COUNT]:
        requests[lists[into, _LAST], _FOLLOWING] = lists[what, _FIRST]
    else:
        lists[into, _FIRST] = lists[what, _FIRST]
    lists[into, _LAST] = lists[what, _LAST]
    lists[into, _COUNT] += lists[what, _COUNT]
    lists[into, _TOKENS] += lists[what, _TOKENS]
    lists[what, _COUNT] = 0
    lists[what, _TOKENS] = 0
