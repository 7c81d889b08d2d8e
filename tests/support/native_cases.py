"""Small clusters of our own, whose steps take whole numbers of ms, so that sums are exact in any order."""

import numpy as np
from hypothesis import strategies as st

from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.profile import Link
from zipserve.planner.native.step_model import StepModel
from zipserve.planner.native.traffic import Traffic, traffic
from zipserve.planner.native.workers import DecodeWorker, Kv, PrefillWorker, Router
from zipserve.planner.workload import workload

BLOCK = 4
PROMPTS_MAX, OUTPUTS_MAX = 24, 12


def model(
    constant: float = 1.0, token: float = 0.0, pair: float = 0.0, row: float = 0.0, context: float = 0.0
) -> StepModel:
    """A straight one."""
    zero = np.zeros(1)
    return StepModel(constant, zero, np.array([token]), pair, zero, np.array([row]), context)


def kv_of(layout: str = "", block_bytes: int = 8, tail_bytes: int = 4) -> Kv:
    return Kv(BLOCK, block_bytes, tail_bytes, layout)


def pair_of(
    prefill: StepModel,
    decode: StepModel,
    *,
    step_tokens: int = 64,
    slots: int = 8,
    prefill_blocks: int = 256,
    decode_blocks: int = 256,
    link: Link | None = None,
    kv: Kv | None = None,
) -> Cluster:
    """One prefill and one decode worker, by default with a link that takes no time to speak of."""
    kv = kv or kv_of()
    return Cluster(
        [PrefillWorker(prefill, kv, step_tokens, slots, prefill_blocks)],
        [DecodeWorker(decode, kv, slots, decode_blocks)],
        [link or Link(1e300, 0.0)],
    )


def alone(
    decode: StepModel, *, step_tokens: int = 64, slots: int = 8, blocks: int = 256, slowdown: float = 1.5
) -> Cluster:
    """One decode worker that computes the prompts as well."""
    worker = DecodeWorker(decode, kv_of(), slots, blocks, step_tokens, slowdown, free_ms=0.0)
    return Cluster([], [worker], router=Router(local_tokens_max=-1))


def load_of(rows: list[tuple[float, int, int]]) -> Traffic:
    """Requests as (gap in ms, prompt, output), for a rate of 1000 per second."""
    gaps, prompts, outputs = zip(*rows, strict=True)
    if not any(gaps[1:]):  # a workload has a rate: nobody is there to see the last one
        gaps, prompts, outputs = (*gaps, 1e6), (*prompts, 1), (*outputs, 1)
    return traffic(workload(prompts, outputs, gaps))


_few = st.integers(0, 2).map(float)
_slopes = st.lists(_few, min_size=1, max_size=3)


@st.composite
def _models(draw: st.DrawFn) -> StepModel:
    tokens, rows = draw(_slopes), draw(_slopes)
    return StepModel(
        draw(st.integers(1, 4).map(float)),
        np.arange(len(tokens), dtype=np.float64) * 3.0,
        np.array(tokens, np.float64),
        draw(st.sampled_from([0.0, 0.0, 0.5])),
        np.arange(len(rows), dtype=np.float64) * 2.0,
        np.array(rows, np.float64),
        draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Any arrangement: some of each role, apart, together or mixed, with room for little more than one request."""
    layouts = draw(st.sampled_from([["a"], ["a"], ["a", "b"]]))
    sizes = {name: draw(st.sampled_from([(8, 4), (16, 8), (64, 32)])) for name in layouts}
    kvs = [Kv(BLOCK, *sizes[name], name) for name in layouts]
    least = -(-(PROMPTS_MAX + OUTPUTS_MAX) // BLOCK)
    limits = {"slots": st.integers(1, 4), "blocks": st.integers(least, 2 * least), "tails": st.integers(1, 4)}

    def limit(name: str) -> int:
        return draw(limits[name])

    local = draw(st.sampled_from([0, 0, 6, -1]))
    overhead = draw(st.sampled_from([0.0, 3.0]))
    prefills = [
        PrefillWorker(
            draw(_models()),
            kvs[i % len(kvs)],
            draw(st.integers(2, 16)),
            limit("slots"),
            limit("blocks"),
            limit("tails"),
            overhead,
        )
        for i in range(draw(st.integers(1, 3)) if local >= 0 else 0)
    ]
    decodes = [
        DecodeWorker(
            draw(_models()),
            kvs[i % len(kvs)],
            limit("slots"),
            limit("blocks"),
            draw(st.integers(1, 16)),
            draw(st.sampled_from([1.25, 1.5, 3.0])),
            limit("tails"),
            overhead,
            draw(st.sampled_from([0.0, 0.0, 12.0])),
        )
        for i in range(draw(st.integers(len(kvs), 3)))
    ]
    links = [
        Link(1000.0 * draw(st.sampled_from([2, 8, 64])), draw(st.integers(0, 3).map(float)))
        for _ in range(draw(st.integers(1, 2)))
    ]
    wires = [[draw(st.integers(0, len(links) - 1)) for _ in decodes] for _ in prefills]
    admits = draw(st.sampled_from([(256, 1 << 19)] * 4 + [(3, 1 << 19), (256, 60)]))
    router = Router(local, *admits)
    return Cluster(prefills, decodes, links, wires, router)


@st.composite
def loads(draw: st.DrawFn) -> Traffic:
    """For a rate of 1000 per second: gaps are whole numbers of ms."""
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, 12).map(float), st.integers(1, PROMPTS_MAX), st.integers(1, OUTPUTS_MAX)),
            min_size=1,
            max_size=12,
        )
    )
    load = load_of(rows)
    share = st.sampled_from([0.0, 0.0, 0.5, 1.0])
    cached = [int(draw(share) * (prompt - 1)) for prompt in load.prompts.tolist()]
    found = [int(draw(share) * (prompt // BLOCK)) for prompt in load.prompts.tolist()]
    classes = [draw(st.integers(0, 1)) for _ in cached]
    return traffic(load, cached, found, classes)
