"""A profile of a device that nobody has measured, from what its data sheet promises. Pure.

A step takes as long as reading the weights, or computing on them where that takes longer, and reading KV besides.
Devices reach a part of what they promise; that part is assumed, and the profile says that nobody measured it.
"""

from dataclasses import dataclass, replace

import numpy as np

from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import SlabKind
from zipserve.planner.native.fit import TERMS
from zipserve.planner.native.profile import ROLES, Hardware, Link, RoleProfile, WorkerProfile
from zipserve.planner.native.step_model import StepModel

COMPUTE_SHARE = 0.6
BANDWIDTH_SHARE = 0.8
"""Of the promised, as good kernels reach it."""
MEMORY_SHARE = 0.9
"""Of the memory, for weights and KV."""
_STEP_TOKENS_MAX = 8192
_SLOTS = 256
_WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class DataSheet:
    """What a device promises."""

    device: str
    flops_per_s: float
    """In the precision that the model computes in."""
    bytes_per_s: float
    """Of its memory."""
    memory_bytes: float
    link_bytes_per_s: float
    """Between two workers."""


def roofline(sheet: DataSheet, like: WorkerProfile, made_at: str, weights: str = "bfloat16") -> WorkerProfile:
    """What workers on a device should be like.

    Args:
        like: has the model, its parallelism and its codec; on whatever device it was measured.
        weights: how they are stored: float32, float16, bfloat16 or int8.

    Raises:
        InvalidRequestError: the model does not fit, or the data sheet cannot be.
    """
    for name in ("flops_per_s", "bytes_per_s", "memory_bytes", "link_bytes_per_s"):
        if not 0 < getattr(sheet, name) < np.inf:
            raise InvalidRequestError(f"{name} {getattr(sheet, name):g} is no number above 0", field=name)
    if weights not in _WEIGHT_BYTES:
        raise InvalidRequestError(f"weights {weights!r} are none of {', '.join(_WEIGHT_BYTES)}", field="weights")
    weight_bytes = _WEIGHT_BYTES[weights] * like.parameters / like.tensor
    room = MEMORY_SHARE * sheet.memory_bytes - weight_bytes
    slabs = like.layout.slab_bytes(SlabKind.BLOCK)
    blocks = int(room / slabs)
    if blocks < 1:
        raise InvalidRequestError(
            f"{weight_bytes / 1e9:.2f} GB of weights and a block of {slabs / 1e6:.2f} MB do not fit into "
            f"{MEMORY_SHARE:.0%} of {sheet.memory_bytes / 1e9:.2f} GB on {sheet.device}",
            field="memory_bytes",
        )
    step, knee = _step(sheet, like, weight_bytes)
    tokens = int(min(max(4 * knee, like.block_tokens), _STEP_TOKENS_MAX))
    part = RoleProfile(step, TERMS, tokens, _SLOTS, blocks, _SLOTS, 0, 0.0, 0.0, 0.0, 0.0)
    return replace(
        like,
        hardware=Hardware(sheet.device, 0, weights, like.hardware.pipeline),
        roles=dict.fromkeys(ROLES, part),
        link=Link(BANDWIDTH_SHARE * sheet.link_bytes_per_s, like.link.fixed_ms if like.link else 0.0),
        measured=False,
        made_at=made_at,
    )


def _step(sheet: DataSheet, like: WorkerProfile, weight_bytes: float) -> tuple[StepModel, float]:
    """The time of a step, and the tokens at which computing takes as long as reading the weights."""
    flops_per_ms = COMPUTE_SHARE * sheet.flops_per_s / 1e3
    bytes_per_ms = BANDWIDTH_SHARE * sheet.bytes_per_s / 1e3
    read_ms = weight_bytes / bytes_per_ms
    token_ms = 2 * like.parameters / like.tensor / flops_per_ms
    knee = read_ms / token_ms
    layout = like.layout
    pair_flops = 2 * layout.layers * like.heads / like.tensor * (layout.key_dim + layout.value_dim)
    knots, slopes = np.array([0.0, knee]), np.array([0.0, token_ms])
    step = StepModel(
        constant_ms=read_ms,
        token_knots=knots,
        token_slopes=slopes,
        pair_ms=pair_flops / flops_per_ms,
        row_knots=knots,
        row_slopes=slopes,
        context_ms=like.block_bytes / like.block_tokens / bytes_per_ms,
    )
    return step, knee
