"""A cluster as the compiled run reads it: constant arrays. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zipserve.planner.native import columns as c
from zipserve.planner.native.pacing import CHUNK_TOKENS_MIN
from zipserve.planner.native.profile import Link
from zipserve.planner.native.step_model import steps_ms
from zipserve.planner.native.workers import DecodeWorker, PrefillWorker, Router

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Machines(NamedTuple):
    """Workers in the order of their stations: all prefill workers, then all decode workers."""

    sizes: Ints
    """[workers, columns]."""
    rates: Floats
    """[workers, columns]."""
    tokens_ms: Floats
    """[workers, tokens]: what a step takes with so many tokens of prompts, its constant included."""
    rows_ms: Floats
    """[workers, rows]: what so many decoding sequences add."""
    wires: Ints
    """[prefill workers, decode workers]: the link between them."""
    links: Floats
    """[links, 2]."""
    rules: Ints


def lay_out(
    prefills: Sequence[PrefillWorker],
    decodes: Sequence[DecodeWorker],
    links: Sequence[Link],
    wires: Sequence[Sequence[int]],
    router: Router,
) -> Machines:
    """Step times become tables, which are cheaper to look up than curves.

    Args:
        wires: by prefill and decode worker, the number of a link.
    """
    workers: list[PrefillWorker | DecodeWorker] = [*prefills, *decodes]
    layouts = sorted({worker.kv.layout for worker in workers})
    sizes = np.zeros((len(workers), c.SIZE_COLUMNS), np.int64)
    rates = np.zeros((len(workers), c.RATE_COLUMNS))
    tokens_ms = np.zeros((len(workers), max(CHUNK_TOKENS_MIN, *(w.step_tokens for w in workers)) + 1))
    rows_ms = np.zeros((len(workers), max(worker.slots for worker in workers) + 1))
    for i, worker in enumerate(workers):
        kv, model = worker.kv, worker.step
        sizes[i, [c.STEP_TOKENS, c.SLOTS, c.BLOCKS, c.TAILS]] = (
            worker.step_tokens, worker.slots, worker.blocks, worker.tails
        )  # fmt: skip
        sizes[i, [c.BLOCK_TOKENS, c.BLOCK_BYTES, c.TAIL_BYTES]] = kv.block_tokens, kv.block_bytes, kv.tail_bytes
        sizes[i, c.LAYOUT] = layouts.index(kv.layout)
        slowdown, free_ms = (worker.slowdown_max, worker.free_ms) if isinstance(worker, DecodeWorker) else (1.0, 0.0)
        rates[i] = model.pair_ms, model.context_ms, slowdown, free_ms, worker.overhead_ms
        tokens, rows = np.arange(tokens_ms.shape[1], dtype=np.float64), np.arange(rows_ms.shape[1], dtype=np.float64)
        none, no_rows = np.zeros(len(tokens)), np.zeros(len(rows))
        tokens_ms[i] = steps_ms(model, tokens, none, none, none)
        rows_ms[i] = steps_ms(model._replace(constant_ms=0.0), no_rows, no_rows, rows, no_rows)
    between = np.array(wires, np.int64).reshape(len(prefills), len(decodes))
    pulls = np.array([(link.bytes_per_s / 1000.0, link.fixed_ms) for link in links]).reshape(-1, 2)
    rules = np.array([router.local_tokens_max, router.requests_max, router.tokens_max], np.int64)
    return Machines(sizes, rates, tokens_ms, rows_ms, between, pulls, rules)
