"""What the arrays of a compiled run hold, column by column.

A run knows requests, and stations: all prefill workers, then all decode workers, then all links. Each has a row of
whole numbers and one of times. Tokens are counted in tokens, KV in blocks, time in ms.
"""

# Of a request, whole numbers. What a decode step touches comes first.
(
    COMPUTED,  # tokens of its prompt whose KV exists, cached ones included
    PROMPT,  # tokens
    TOKENS,  # that its blocks must have room for on the decode worker: one more than it has KV of while it decodes
    LEFT,  # tokens still to be decoded
    HELD,  # blocks on the decode worker
    GAPS_END,  # where its next gap is noted
    OUTPUT,  # tokens to decode, the first one not counted
    CACHED,  # tokens of the prompt that need not be computed
    FOUND,  # blocks that the decode worker has already, which are not pulled
    PREFILL,  # station that computes its prompt
    DECODE,  # station that decodes it
    NUMBER,  # of its arrival at the decode worker
    STARTED,  # whether the prompt has its slot and slabs
    SHARE,  # tokens of its prompt in the step that runs
    PARKED,  # whether it ever had to make room
    LATE,  # bit q: it counts as late in objective q
    CLASS,
    BEFORE,  # neighbours in the list that it stands in
    AFTER,
    REQUEST_COLUMNS,
) = range(20)

# Of a request, times.
(
    ARRIVED,  # at the router
    FIRST,  # its first token
    DONE,  # its last token
    LAST,  # its newest token
    GAP_MAX,  # the gap that it may have without being late in anything
    PULLED,  # end of its pull
    TIME_COLUMNS,
) = range(7)

# Of a station, whole numbers.
(
    HEAD,  # ends of its list: a prefill worker's prompts, a decode worker's line, a link's pulls; -1: none
    TAIL,
    SLOTS_USED,
    BLOCKS_USED,
    TAILS_USED,
    OUTSTANDING,  # what the router counts: tokens to compute of a prefill worker, requests of a decode worker
    PICKED,  # number of the router's last pick of it
    ENTERED,  # requests that ever came
    DIRTY,  # whether it is to begin a step, if it can, before time goes on
    RUNNING,  # sequences of a decode worker that are in its batch
    STEPPING,  # those that take part in the step that runs, the first ones
    SHARING,  # prompts that have a share in the step that runs
    PROMPTS,  # running sequences whose prompt is not complete
    CONTEXT,  # sum of TOKENS of those whose prompt is
    MISSING,  # blocks that running sequences need for their next step and do not hold
    GROWING,  # sequences with slabs that will need more blocks
    FRESH_TAILS,  # tail slabs of running sequences that have not had a step
    SPENT_TAILS,  # those that the running step unpacks
    STEP_ROWS,  # sequences that decode in the running step
    STEP_PROMPT_TOKENS,  # tokens of prompts in it
    STEPS,
    PARKINGS,
    SLOTS_PEAK,
    BLOCKS_PEAK,
    TAILS_PEAK,
    STATION_COLUMNS,
) = range(26)

# Of a station, times.
(
    STEP_MS,  # what its step takes
    FREE,  # when a link has read all that was posted so far
    BUSY,  # ms in which it computed or read
    CLOCK_COLUMNS,
) = range(4)

# Of a worker, what it is, whole numbers.
(
    STEP_TOKENS,  # most tokens of prompts in a step
    SLOTS,
    BLOCKS,
    TAILS,
    BLOCK_TOKENS,
    BLOCK_BYTES,
    TAIL_BYTES,
    LAYOUT,  # number of the layout that it writes or reads
    SIZE_COLUMNS,
) = range(9)

# Of a worker, what it is, other numbers.
(
    PAIR_MS,
    CONTEXT_MS,
    SLOWDOWN,  # how many times longer than without prompts a decode step may take
    FREE_MS,  # how long it may take in any case
    OVERHEAD_MS,  # added to the first token of every request whose prompt it computes
    RATE_COLUMNS,
) = range(6)

# Of a link.
BYTES_PER_MS, FIXED_MS = range(2)

# The router's rules.
LOCAL_TOKENS_MAX, REQUESTS_MAX, TOKENS_MAX = range(3)

# Of the whole run.
(
    ARRIVALS,  # requests that have come
    LOOKED_AT,  # those of them whose first token is there, or overdue
    PICKS,  # routes chosen
    REQUESTS,  # in flight
    REQUEST_TOKENS,  # of those, reserved
    DIRTY_STATIONS,
    IS_LOST,  # whether an objective can not be kept any more
    COUNTERS,
) = range(8)

# Of an objective, bounds in ms: times of a request, and any gap, one by one.
TTFT, TPOT, GAP, E2E, EVERY_GAP = range(5)

NONE = -1
UNKNOWN = -1.0
