"""A plan in words and as one object for programs. Pure."""

from collections.abc import Iterable
from typing import Any

from zipserve.planner.native.objectives import GapObjective, Objective
from zipserve.planner.placement.candidate import APART, TOGETHER, Candidate, Group
from zipserve.planner.placement.curves import Curve
from zipserve.planner.placement.search import Found, Question, Ranking

_ROWS = 8


def as_text(ranking: Ranking, question: Question) -> str:
    """The verdict, the best candidates, and why others are none."""
    best = ranking.best()
    assert best is not None
    fleet = ", ".join(f"{count} × {name}" for name, count in question.fleet.counts.items())
    limits = "; ".join(map(objective_text, question.slo.objectives))
    verdict = "Do not disaggregate" if best.candidate.arrangement == TOGETHER else "Disaggregate"
    lines = [f"{question.profiles[0].model} on {fleet}, {len(question.traffic)} requests; {limits}", ""]
    lines.append(f"{verdict}: {_served(best)}")
    if question.rate is not None and best.rate < question.rate:
        lines.append(f"  {question.rate:g} requests/s are not served by anything that fits; this serves most")
    other = ranking.best(APART if best.candidate.arrangement == TOGETHER else TOGETHER)
    if other is not None:
        lines.append(f"  instead of {_served(other)}")
    if not all(profile.measured for profile in question.profiles):
        names = sorted({profile.hardware.device for profile in question.profiles if not profile.measured})
        lines.append(f"  nobody has measured {', '.join(names)}: their times are what data sheets promise")
    return "\n".join([*lines, "", *_table(ranking), *_refusals(ranking)])


def objective_text(objective: Objective | GapObjective) -> str:
    """An objective in words."""
    share = f"{objective.share * 100:g} %"
    of = "" if objective.of is None else f" of class {objective.of}"
    if isinstance(objective, GapObjective):
        return f"{share} of all gaps{of} ≤ {objective.gap_ms:g} ms"
    names = ("TTFT", "TPOT", "every gap", "end to end")
    limits = zip(names, objective.limits_ms, strict=False)
    told = " and ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits if limit < float("inf"))
    return f"{share} of the requests{of} keep {told}"


def as_object(ranking: Ranking, question: Question, curves: Iterable[Curve] = ()) -> dict[str, Any]:
    """All that was found, for JSON."""
    best = ranking.best()
    assert best is not None
    return {
        "model": question.profiles[0].model,
        "devices": dict(question.fleet.counts),
        "prices": dict(question.fleet.prices),
        "measured": all(profile.measured for profile in question.profiles),
        "requests": len(question.traffic),
        "seeds": list(question.seeds),
        "slo": [objective_text(one) for one in question.slo.objectives],
        "rate": question.rate,
        "disaggregate": best.candidate.arrangement == APART,
        "best": _found_object(best),
        "candidates": [_found_object(one) for one in ranking.found],
        "refused": [{"what": one.what, "why": one.why} for one in ranking.refused],
        "curves": [
            {
                "candidate": _candidate_object(one.candidate),
                "rates": one.rates.tolist(),
                "attained": one.attained.tolist(),
            }
            for one in curves
        ],
    }


def _served(found: Found) -> str:
    assert found.goodput is not None
    low, high = found.goodput.interval
    spread = f" ({low:.3g} to {high:.3g})" if len(found.goodput.rates) > 1 else ""
    return (
        f"{found.candidate}: {found.rate:.4g} requests/s{spread}, {found.per_cost:.4g} for its cost of {found.cost:g}"
    )


def _table(ranking: Ranking) -> Iterable[str]:
    kept = [one for one in ranking.found if one.rate]
    skipped = sum(one.goodput is None and not one.refused for one in ranking.found)
    failed = [one for one in ranking.found if one.refused or (one.goodput is not None and not one.rate)]
    yield f"{len(kept)} keep the limits, {len(failed)} do not at any rate, {skipped} cannot win by their bounds"
    rows = [("requests/s", "for cost", "bound", "cost", "candidate")]
    rows += [
        (f"{one.rate:.4g}", f"{one.per_cost:.4g}", f"{one.ceiling:.4g}", f"{one.cost:g}", str(one.candidate))
        for one in kept[:_ROWS]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows if kept else ():
        yield "  " + "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
    reasons: dict[str, list[str]] = {}
    for one in failed:
        why = one.refused or (one.goodput.why if one.goodput else "")
        reasons.setdefault(why, []).append(str(one.candidate))
    for why, names in list(reasons.items())[:_ROWS]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"  no goodput: {names[0]}{more}: {why}"


def _refusals(ranking: Ranking) -> Iterable[str]:
    return (f"  not used: {one.what} {one.why}" for one in ranking.refused)


def _found_object(found: Found) -> dict[str, Any]:
    goodput = found.goodput
    return {
        **_candidate_object(found.candidate),
        "cost": found.cost,
        "bound": found.ceiling,
        "goodput": None if goodput is None else found.rate,
        "goodput_per_cost": None if goodput is None else found.per_cost,
        "goodput_by_seed": None if goodput is None else list(goodput.rates),
        "why": found.refused or (goodput.why if goodput else ""),
    }


def _candidate_object(candidate: Candidate) -> dict[str, Any]:
    groups = {"prefill": candidate.prefill, "decode": candidate.decode}
    return {
        "arrangement": candidate.arrangement,
        "devices": dict(candidate.taken),
        **{role: _group_object(group) for role, group in groups.items() if group is not None},
    }


def _group_object(group: Group) -> dict[str, Any]:
    profile = group.profile
    return {
        "replicas": group.replicas,
        "device": profile.hardware.device,
        "tensor": profile.tensor,
        "codec": profile.codec,
        "step_tokens": group.settings.step_tokens,
        "slots": group.settings.slots,
        "free_ms": group.settings.free_ms,
    }
