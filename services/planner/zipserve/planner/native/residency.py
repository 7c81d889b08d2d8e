"""Who holds which slots, blocks and tails of a worker. Compiled.

Of the blocks that a worker only keeps for later prompts nothing is seen here: they count as free, as they do there.
What a request has found in them counts as its own: requests that share blocks hold a little more here than there.
"""

from zipserve.planner.native import columns as c
from zipserve.planner.native.compiled import compiled
from zipserve.planner.native.machines import Machines
from zipserve.planner.native.state import State


@compiled
def try_start(machines: Machines, state: State, worker: int, request: int) -> bool:
    """Whether a prompt now gets its slot and slabs on a prefill worker: all that it will fill."""
    station, size = state.stations[worker], machines.sizes[worker]
    prompt = state.requests[request, c.PROMPT]
    blocks, tail = prompt // size[c.BLOCK_TOKENS], has_tail(prompt, size[c.BLOCK_TOKENS])
    if (
        station[c.SLOTS_USED] >= size[c.SLOTS]
        or station[c.BLOCKS_USED] + blocks > size[c.BLOCKS]
        or station[c.TAILS_USED] + tail > size[c.TAILS]
    ):
        return False
    _take(state, worker, blocks, tail, 1)
    state.requests[request, c.STARTED] = 1
    state.requests[request, c.COMPUTED] = state.requests[request, c.CACHED]
    return True


@compiled
def leave_slot(state: State, worker: int) -> None:
    """A prompt is complete: others may have its slot, its slabs it keeps."""
    _take(state, worker, 0, 0, -1)


@compiled
def release_prompt(machines: Machines, state: State, request: int) -> None:
    """The lease of a prompt ends: its slabs on the prefill worker are free. Its slot was before."""
    worker = state.requests[request, c.PREFILL]
    prompt, block_tokens = state.requests[request, c.PROMPT], machines.sizes[worker, c.BLOCK_TOKENS]
    _take(state, worker, -(prompt // block_tokens), -has_tail(prompt, block_tokens), 0)


@compiled
def try_hold(machines: Machines, state: State, worker: int, request: int) -> bool:
    """Whether a sequence now gets its slot and slabs on a decode worker: those for its tokens, when as many blocks are
    left that everybody can grow by one. Alone on the worker it gets them all the same."""
    station, size = state.stations[worker], machines.sizes[worker]
    tokens, block_tokens = state.requests[request, c.TOKENS], size[c.BLOCK_TOKENS]
    blocks, tail = tokens // block_tokens, pulls_tail(machines, state, worker, request)
    grows = blocks < _blocks_max(state, request, block_tokens)
    reserve = station[c.GROWING] + grows if station[c.SLOTS_USED] else 0
    if (
        station[c.SLOTS_USED] >= size[c.SLOTS]
        or station[c.BLOCKS_USED] + blocks + reserve > size[c.BLOCKS]
        or station[c.TAILS_USED] + tail > size[c.TAILS]
    ):
        return False
    _take(state, worker, blocks, tail, 1)
    station[c.GROWING] += grows
    state.requests[request, c.HELD] = blocks
    return True


@compiled
def let_go(machines: Machines, state: State, worker: int, request: int) -> None:
    """A running sequence gives back its slot and slabs. Its tail, it was done with at the end of its first step."""
    station, block_tokens = state.stations[worker], machines.sizes[worker, c.BLOCK_TOKENS]
    held = state.requests[request, c.HELD]
    _take(state, worker, -held, 0, -1)
    station[c.GROWING] -= held < _blocks_max(state, request, block_tokens)
    state.requests[request, c.HELD] = 0


@compiled
def make_room(machines: Machines, state: State, worker: int, request: int) -> None:
    """A running sequence gives back all that it holds, before its next step."""
    station = state.stations[worker]
    station[c.MISSING] -= misses_block(machines, state, worker, request)
    if is_fresh(machines, state, worker, request):
        station[c.FRESH_TAILS] -= 1
        _take(state, worker, 0, -1, 0)
    let_go(machines, state, worker, request)


@compiled
def free_spent_tails(state: State, worker: int) -> None:
    """A step has unpacked the tails of those for whom it was the first."""
    station = state.stations[worker]
    station[c.FRESH_TAILS] -= station[c.SPENT_TAILS]
    _take(state, worker, 0, -station[c.SPENT_TAILS], 0)
    station[c.SPENT_TAILS] = 0


@compiled
def grow(machines: Machines, state: State, worker: int) -> None:
    """Gives all running sequences the blocks that their next step needs; there have to be enough."""
    station, block_tokens = state.stations[worker], machines.sizes[worker, c.BLOCK_TOKENS]
    if not station[c.MISSING]:
        return
    for row in range(station[c.RUNNING]):
        request = state.rows[worker, row]
        if misses_block(machines, state, worker, request):
            state.requests[request, c.HELD] += 1
            done = state.requests[request, c.HELD] == _blocks_max(state, request, block_tokens)
            station[c.GROWING] -= done
    _take(state, worker, station[c.MISSING], 0, 0)
    station[c.MISSING] = 0


@compiled
def misses_block(machines: Machines, state: State, worker: int, request: int) -> int:
    """Whether a sequence needs one block more than it holds; it never needs two."""
    tokens, held = state.requests[request, c.TOKENS], state.requests[request, c.HELD]
    return int(tokens >= (held + 1) * machines.sizes[worker, c.BLOCK_TOKENS])


@compiled
def is_fresh(machines: Machines, state: State, worker: int, request: int) -> int:
    """Whether a running sequence still has the tail that was pulled for it: until its first step has ended."""
    is_new = state.requests[request, c.TOKENS] == state.requests[request, c.PROMPT] + 1
    return int(is_new and pulls_tail(machines, state, worker, request) == 1)


@compiled
def pulls_tail(machines: Machines, state: State, worker: int, request: int) -> int:
    """Whether a tail is pulled for a sequence. Who was parked brings its own along."""
    if state.requests[request, c.PREFILL] == c.NONE or state.requests[request, c.PARKED]:
        return 0
    return int(has_tail(state.requests[request, c.PROMPT], machines.sizes[worker, c.BLOCK_TOKENS]))


@compiled
def has_tail(tokens: int, block_tokens: int) -> int:
    """Whether something follows the last block."""
    return int(tokens % block_tokens > 0)


@compiled
def _blocks_max(state: State, request: int, block_tokens: int) -> int:
    """Blocks of a sequence in the end."""
    return int((state.requests[request, c.PROMPT] + state.requests[request, c.OUTPUT]) // block_tokens)


@compiled
def _take(state: State, worker: int, blocks: int, tails: int, slots: int) -> None:
    station = state.stations[worker]
    station[c.BLOCKS_USED] += blocks
    station[c.TAILS_USED] += tails
    station[c.SLOTS_USED] += slots
    station[c.BLOCKS_PEAK] = max(station[c.BLOCKS_PEAK], station[c.BLOCKS_USED])
    station[c.TAILS_PEAK] = max(station[c.TAILS_PEAK], station[c.TAILS_USED])
    station[c.SLOTS_PEAK] = max(station[c.SLOTS_PEAK], station[c.SLOTS_USED])
