"""From what workers told to their profiles."""

import re
from collections.abc import Mapping, Sequence

from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.refs import layout_of
from zipserve.planner.native.fit import STEPS_MIN, fit
from zipserve.planner.native.profile import Hardware, Link, Role, RoleProfile, WorkerProfile
from zipserve.planner.profiling.cluster import Watched
from zipserve.v1.worker_service_pb2 import Capabilities

Kind = tuple[Hardware, bytes]
"""Workers of one kind belong into one profile: the same hardware, and the same layout."""


def kinds(workers: Sequence[Watched]) -> dict[Kind, list[Watched]]:
    """The workers by their kind."""
    found: dict[Kind, list[Watched]] = {}
    for worker in workers:
        facts = worker.record.capabilities
        found.setdefault((hardware_of(facts), layout_of(facts.layout).fingerprint), []).append(worker)
    return found


def hardware_of(facts: Capabilities) -> Hardware:
    """What a worker computes on; a CPU is told by its number of threads."""
    on_cpu = facts.device == "cpu"
    name = f"cpu-{facts.threads}" if on_cpu else re.sub(r"[^a-z0-9]+", "-", facts.device.lower()).strip("-")
    return Hardware(name, facts.threads if on_cpu else 0, facts.weights, 1)


def profile_of(
    workers: Sequence[Watched],
    link: Link | None,
    overhead_ms: float | None,
    made_at: str,
    base: WorkerProfile | None = None,
) -> WorkerProfile:
    """The profile of workers of one kind.

    Args:
        base: an older profile of the same kind, for what was not measured now.

    Raises:
        InvalidRequestError: the steps do not determine the time of a step; the message says of whom, and why.
    """
    facts = workers[0].record.capabilities
    by_role: dict[Role, list[Watched]] = {}
    for worker in workers:
        by_role.setdefault(worker.role, []).append(worker)
    older: Mapping[str, RoleProfile] = base.roles if base else {}
    return WorkerProfile(
        hardware=hardware_of(facts),
        layout=layout_of(facts.layout),
        parameters=facts.parameters,
        heads=facts.heads,
        roles={role: _role(role, those, older.get(role)) for role, those in by_role.items()},
        link=link or (base.link if base else None),
        overhead_ms=overhead_ms if overhead_ms is not None else (base.overhead_ms if base else None),
        measured=True,
        made_at=made_at,
    )


def _role(role: Role, workers: Sequence[Watched], older: RoleProfile | None) -> RoleProfile:
    steps = [step for worker in workers for step in worker.steps]
    if older is not None and len(steps) < STEPS_MIN:
        return older
    try:
        found = fit(steps, older.step if older else None)
    except InvalidRequestError as error:
        names = ", ".join(worker.name for worker in workers)
        raise InvalidRequestError(f"{role} workers ({names}): {error.message}", field=error.field) from error
    facts, loads = [worker.record.capabilities for worker in workers], [worker.record.load for worker in workers]
    return RoleProfile(
        step=found.model,
        terms=found.terms,
        step_tokens=min(fact.step_tokens for fact in facts),
        slots=min(fact.sequences_max for fact in facts),
        blocks=min(load.total_blocks for load in loads),
        tails=min(load.total_tails for load in loads),
        steps=found.steps,
        error_p50=found.error_p50,
        error_p90=found.error_p90,
        setting_error_p50=found.setting_error_p50,
        setting_error_p90=found.setting_error_p90,
    )


def file_name(profile: WorkerProfile) -> str:
    """Tells profiles of one cluster apart."""
    parts = (profile.model.rpartition("/")[2], profile.hardware.device, f"tp{profile.tensor}", profile.codec)
    return "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in parts) + ".json"
