"""What a cluster consists of, besides links: workers of both roles and the router; each with what its times depend on.
Pure."""

import math
from dataclasses import dataclass

import numpy as np

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.step_model import StepModel

TAILS_DEFAULT = 64
SLOWDOWN_DEFAULT = 1.5
FREE_MS_DEFAULT = 100.0
REQUESTS_MAX_DEFAULT = 256
TOKENS_MAX_DEFAULT = 1 << 19


@dataclass(frozen=True)
class Kv:
    """What the KV of a sequence takes."""

    block_tokens: int
    block_bytes: int
    """Of a full block, as it is pulled, with its header."""
    tail_bytes: int
    """Of what follows the last block."""
    layout: str = ""
    """Workers hand KV over only to those of the same layout: model, codec and block size."""


@dataclass(frozen=True, eq=False)
class PrefillWorker:
    """A worker that computes prompts. Its limits are the settings of the same names."""

    step: StepModel
    kv: Kv
    step_tokens: int
    """Most tokens in a step."""
    slots: int
    """Most prompts that are computed side by side."""
    blocks: int
    tails: int = TAILS_DEFAULT
    overhead_ms: float = 0.0
    """What the router and the calls add to the first token."""


@dataclass(frozen=True, eq=False)
class DecodeWorker:
    """A worker that decodes, and computes prompts beside it where the router tells it to."""

    step: StepModel
    """Covers steps that do both."""
    kv: Kv
    slots: int
    """Most sequences that hold slabs, whether they decode or are being pulled."""
    blocks: int
    step_tokens: int = 256
    """Most tokens of prompts in a step."""
    slowdown_max: float = SLOWDOWN_DEFAULT
    """How many times longer than without prompts a step may take that decodes."""
    tails: int = TAILS_DEFAULT
    overhead_ms: float = 0.0
    """What the router and the calls add to the first token, where the prompt is computed here."""
    free_ms: float = FREE_MS_DEFAULT
    """With prompts a step may take so long in any case."""


@dataclass(frozen=True)
class Router:
    """The router's settings of the same names, with their defaults."""

    local_tokens_max: int = 0
    """Prompts of at most so many tokens are computed on the decode worker. 0: none; -1: all."""
    requests_max: int = REQUESTS_MAX_DEFAULT
    """Most requests in flight; one more is refused."""
    tokens_max: int = TOKENS_MAX_DEFAULT
    """Most tokens of those, prompts and answers."""

    def is_local(self, prompt: int) -> bool:
        """Whether a prompt of so many tokens is computed where it is decoded."""
        return self.local_tokens_max < 0 or prompt <= self.local_tokens_max


def check_worker(name: str, worker: PrefillWorker | DecodeWorker) -> None:
    """Raises InvalidRequestError for what no worker can be."""
    for what in ("step_tokens", "slots", "blocks", "tails"):
        check_limit(name, what, getattr(worker, what), least=1)
    for what in ("block_tokens", "block_bytes", "tail_bytes"):
        check_limit(name, what, getattr(worker.kv, what), least=1)
    check_limit(name, "overhead_ms", worker.overhead_ms, least=0.0)
    model = worker.step
    for what, curve in (
        ("token", (model.token_knots, model.token_slopes)),
        ("row", (model.row_knots, model.row_slopes)),
    ):
        knots, slopes = curve
        if len(knots) != len(slopes) or not len(knots) or knots[0] != 0 or np.any(np.diff(knots) <= 0):
            raise InvalidRequestError(
                f"{name}: {what}_knots must rise from 0, with as many slopes", field=f"{what}_knots"
            )
        check_limit(name, f"{what}_slopes", float(np.min(slopes)), least=0.0)
    check_limit(name, "constant_ms", model.constant_ms, least=0.0)
    check_limit(name, "pair_ms", model.pair_ms, least=0.0)
    check_limit(name, "context_ms", model.context_ms, least=0.0)


def check_limit(name: str, what: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raises InvalidRequestError for a number that is out of bounds, or none; the message names all three."""
    if not (math.isfinite(value) and value >= least and value > above):
        limit = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise InvalidRequestError(f"{name} has {what} {value:g}, it must be {limit}", field=what)
