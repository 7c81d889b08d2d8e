"""A plan in words: a table for people, one object for programs. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from zipserve.planner.plan import COLOCATED, Plan, Question
from zipserve.planner.search import Candidate, Deployment, Ranking
from zipserve.planner.simulation import Placement

_ROWS = 8


def as_text(plan: Plan, question: Question) -> str:
    """The verdict, the best of each search, and why other shapes are none."""
    name, best = plan.best
    slo = question.slo
    kind = "of the requests keep both" if slo.joint else "percentile of each by itself"
    devices = f"{question.devices.nodes} × {question.devices.per_node} devices"
    limits = f"TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms, {slo.attainment * 100:g} % {kind}"
    lines = [
        f"{question.model.name} on {devices}, {len(question.workload)} requests; {limits}",
        "",
        f"{'Do not disaggregate' if name == COLOCATED else 'Disaggregate'}: {_deployment(best)}",
    ]
    lines += [f"  instead of {_deployment(other)}" for key, other in plan.deployments.items() if key != name]
    lines += [f"  {key}: {error.message}" for key, error in plan.refused.items()]
    for space, ranking in plan.rankings.items():
        lines += ["", *_ranking(space, ranking)]
    return "\n".join(lines)


def as_object(plan: Plan, question: Question) -> dict[str, Any]:
    """All that was found, for JSON."""
    name, best = plan.best
    return {
        "model": question.model.name,
        "devices": {"nodes": question.devices.nodes, "per_node": question.devices.per_node},
        "requests": len(question.workload),
        "slo": {
            "ttft_ms": question.slo.ttft_ms,
            "tpot_ms": question.slo.tpot_ms,
            "attainment": question.slo.attainment,
            "joint": question.slo.joint,
        },
        "disaggregate": name != COLOCATED,
        "best": {"arrangement": name, **_deployment_object(best)},
        "deployments": {key: _deployment_object(deployment) for key, deployment in plan.deployments.items()},
        "refused": {key: {"field": error.field, "message": error.message} for key, error in plan.refused.items()},
        "searched": {
            space: {
                "candidates": [_candidate_object(candidate) for candidate in ranking.candidates],
                "infeasible": [{"shape": list(shape), "why": why} for shape, why in ranking.infeasible],
            }
            for space, ranking in plan.rankings.items()
        },
    }


def _deployment(deployment: Deployment) -> str:
    parts = " and ".join(f"{count} × {_placement(placement)}" for count, placement in deployment.parts)
    served = f"{deployment.rate:.4g} requests/s on {deployment.devices} devices, {deployment.goodput:.4g} per device"
    if deployment.attained is None:
        return f"{parts}: {served}"
    return f"{parts}: {served}; taking turns, {deployment.attained * 100:.3g} % of the requests keep both limits"


def _placement(placement: Placement) -> str:
    roles = (("prefill", placement.prefill), ("decode", placement.decode), ("both", placement.both))
    parts = [f"{role} TP {one.tensor} PP {one.pipeline}" for role, one in roles if one is not None]
    segments = f" in {placement.segments} segments" if placement.segments > 1 else ""
    return f"({' + '.join(parts)}{segments})"


def _ranking(space: str, ranking: Ranking) -> Iterable[str]:
    pruned = sum(candidate.goodput is None for candidate in ranking.candidates)
    failed = [candidate for candidate in ranking.candidates if candidate.why]
    kept = [candidate for candidate in ranking.candidates if candidate.goodput]
    yield (
        f"{space}: {len(kept)} keep the limits, {len(failed)} do not at any rate, {pruned} cannot win by their bounds, "
        f"{len(ranking.infeasible)} are infeasible"
    )
    rows = [
        (_placement(one.placement), str(one.placement.devices), f"{one.goodput:.4g}", f"{one.ceiling:.4g}")
        for one in kept[:_ROWS]
    ]
    if rows:
        yield from _table(("placement", "devices", "goodput per device", "bound"), rows)
    yield from (f"  no goodput: {_placement(one.placement)}: {one.why}" for one in failed[:_ROWS])
    reasons: dict[str, list[str]] = {}
    for shape, why in ranking.infeasible:
        reasons.setdefault(why, []).append("×".join(map(str, shape)))
    for why, shapes in reasons.items():
        more = ", …" if len(shapes) > 3 else ""
        yield f"  infeasible: {why} ({', '.join(shapes[:3])}{more})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  " + "  ".join([first.strip().ljust(widths[0]), *others])


def _placement_object(placement: Placement) -> dict[str, Any]:
    roles = (("prefill", placement.prefill), ("decode", placement.decode), ("both", placement.both))
    parts = {role: {"tensor": one.tensor, "pipeline": one.pipeline} for role, one in roles if one is not None}
    return {"shape": list(placement.shape), "segments": placement.segments, "devices": placement.devices, **parts}


def _deployment_object(deployment: Deployment) -> dict[str, Any]:
    return {
        "parts": [{"copies": count, **_placement_object(placement)} for count, placement in deployment.parts],
        "devices": deployment.devices,
        "requests_per_s": deployment.rate,
        "goodput_per_device": deployment.goodput,
        "attained_together": deployment.attained,
    }


def _candidate_object(candidate: Candidate) -> dict[str, Any]:
    return {
        **_placement_object(candidate.placement),
        "goodput_per_device": candidate.goodput,
        "bound_per_device": candidate.ceiling,
        "why": candidate.why,
    }
