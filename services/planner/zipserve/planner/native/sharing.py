"""How the prompt tokens of a step are shared out among prompts: the rule of `zipserve.common.chunking`. Compiled."""

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.residency import try_start
from zipserve.planner.native.state import State


@compiled
def share(machines: Machines, state: State, worker: int, count: int, step_tokens: int, may_start: bool) -> None:
    """Writes how many tokens each of the first `count` prompts of `state.order`, which stand there by rank, has in the
    next step, and who they are into `state.chunks`. The first is offered half of the step; then come those that have
    less left, the shortest first; what they leave goes to the first again, and then to the others by rank.

    Args:
        may_start: whether prompts may be started; if not, they are passed over.
    """
    order = state.order
    head = order[0]
    state.stations[worker, c.SHARING] = 0
    head_left = left(state, head)
    free = step_tokens
    free -= _offer(machines, state, worker, head, min(free, (step_tokens + 1) // 2), may_start)
    found, found_left = 0, 0
    while free:
        found, found_left = _next_shorter(state, count, head_left, found, found_left)
        if not found:
            break
        free -= _offer(machines, state, worker, order[found], free, may_start)
    if free:
        free -= _offer(machines, state, worker, head, free, may_start)
    for i in range(1, count):
        if not free:
            break
        free -= _offer(machines, state, worker, order[i], free, may_start)


@compiled
def left(state: State, request: int) -> int:
    """Tokens of a prompt that are still to be computed; of one that has not been started, all."""
    return int(state.requests[request, c.PROMPT] - state.requests[request, c.COMPUTED])


@compiled
def shared(state: State, worker: int) -> tuple[int, float]:
    """Tokens of the prompts in a step, and pairs of such a token with one that it attends to."""
    total, pairs = 0, 0
    for i in range(state.stations[worker, c.SHARING]):
        request = state.chunks[worker, i]
        tokens, before = state.requests[request, c.SHARE], state.requests[request, c.COMPUTED]
        total += tokens
        pairs += tokens * before + tokens * (tokens + 1) // 2
    return total, float(pairs)


@compiled
def count_shares(state: State, worker: int) -> int:
    """A step has computed the shares of its prompts. Those that are complete with it come first in `state.chunks`;
    returns how many they are."""
    complete = 0
    for i in range(state.stations[worker, c.SHARING]):
        request = state.chunks[worker, i]
        state.requests[request, c.COMPUTED] += state.requests[request, c.SHARE]
        state.requests[request, c.SHARE] = 0
        if not left(state, request):
            state.chunks[worker, complete] = request
            complete += 1
    state.stations[worker, c.SHARING] = 0
    return complete


@compiled
def _next_shorter(state: State, count: int, head_left: int, found: int, found_left: int) -> tuple[int, int]:
    """Place and tokens left of the prompt that comes after the one found last, by tokens left and then by rank, among
    those that have less left than the first; place 0: there is none.

    One that was started after it was found has less left since, and is not found again.
    """
    best, best_left = 0, head_left
    for i in range(1, count):
        tokens = left(state, state.order[i])
        follows = tokens > found_left or (tokens == found_left and i > found)
        if follows and tokens < best_left:
            best, best_left = i, tokens
    return best, best_left


@compiled
def _offer(machines: Machines, state: State, worker: int, request: int, tokens: int, may_start: bool) -> int:
    """Tokens that a prompt takes of those offered."""
    requests = state.requests
    if not requests[request, c.STARTED] and not (may_start and try_start(machines, state, worker, request)):
        return 0
    taken = min(tokens, left(state, request) - requests[request, c.SHARE])
    if taken and not requests[request, c.SHARE]:
        state.chunks[worker, state.stations[worker, c.SHARING]] = request
        state.stations[worker, c.SHARING] += 1
    requests[request, c.SHARE] += taken
    return int(taken)
