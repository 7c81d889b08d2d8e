"""Clusters made of measured workers: so many of each kind, apart or together. Pure."""

from collections.abc import Sequence

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.profile import Link, WorkerProfile
from zipserve.planner.native.workers import SLOWDOWN_DEFAULT, DecodeWorker, Kv, PrefillWorker, Router

ALL = -1
"""As the router has it: all prompts are computed where they are decoded."""


def apart(
    prefills: Sequence[WorkerProfile],
    decodes: Sequence[WorkerProfile],
    router: Router | None = None,
    slowdown_max: float = SLOWDOWN_DEFAULT,
) -> Cluster:
    """Prefill workers that hand over to decode workers, one for each profile. What a decode worker pulls goes over the
    link of its profile, whoever has it.

    Raises:
        InvalidRequestError: a role or the link was not measured, or the cluster could not serve.
    """
    router = router or Router()
    mixes = router.local_tokens_max != 0
    return Cluster(
        [prefill_worker(profile) for profile in prefills],
        [decode_worker(profile, mixes=mixes, slowdown_max=slowdown_max) for profile in decodes],
        [_link(profile) for profile in decodes] if prefills else (),
        [tuple(range(len(decodes)))] * len(prefills),
        router,
    )


def together(
    workers: Sequence[WorkerProfile], router: Router | None = None, slowdown_max: float = SLOWDOWN_DEFAULT
) -> Cluster:
    """Decode workers that compute all prompts as well.

    Args:
        router: its limits; where prompts are computed does not count.

    Raises:
        InvalidRequestError: decode steps with prompts were not measured, or the cluster could not serve.
    """
    limits = router or Router()
    return apart((), workers, Router(ALL, limits.requests_max, limits.tokens_max), slowdown_max)


def prefill_worker(profile: WorkerProfile) -> PrefillWorker:
    """A prefill worker as it was measured."""
    role = profile.role("prefill")
    return PrefillWorker(
        role.step, _kv(profile), role.step_tokens, role.slots, role.blocks, role.tails, profile.overhead_ms or 0.0
    )


def decode_worker(profile: WorkerProfile, *, mixes: bool, slowdown_max: float = SLOWDOWN_DEFAULT) -> DecodeWorker:
    """A decode worker as it was measured.

    Args:
        mixes: whether it computes prompts as well.
    """
    role = profile.role("decode", mixes=mixes)
    return DecodeWorker(
        role.step,
        _kv(profile),
        role.slots,
        role.blocks,
        role.step_tokens,
        slowdown_max,
        role.tails,
        profile.overhead_ms or 0.0,
    )


def _kv(profile: WorkerProfile) -> Kv:
    return Kv(profile.block_tokens, profile.block_bytes, profile.tail_bytes, profile.layout.fingerprint.hex())


def _link(profile: WorkerProfile) -> Link:
    if profile.link is None:
        raise InvalidRequestError(f"{profile} does not know how fast KV is pulled", field="profile")
    return profile.link
