"""What the engine is like as a service: time to start, memory, and streams beside long prompts."""

import statistics
from collections.abc import Iterable
from typing import Any

from zipserve.bench import report, stack
from zipserve.bench.engine import gaps, memory
from zipserve.bench.engine.gaps import Gaps, Load
from zipserve.bench.engine.work import Work
from zipserve.bench.report import Check
from zipserve.bench.stack import Stack
from zipserve.engine import startup

_QUICK = {"streams": 2, "stream_prompt_tokens": 16, "quiet_tokens": 4, "prompt_tokens": 200, "prompts": 1}
STACKS = {"colocated": stack.COLOCATED, "apart": stack.APART}


def resident(
    model: str, variants: Iterable[tuple[startup.Path, startup.Weights]], work: Work, *, decides: bool
) -> list[Check]:
    """Memory of loaded models, by path and storage of weights."""
    checks = []
    for path, weights in variants:
        grown = memory.resident_bytes(model, path, weights) / work.weight_bytes(weights)
        # Room for the modules that loading imports, and for norms.
        checks.append(Check(f"memory of {path} {weights}, times its weights", grown, "<=", 1.25, decides))
        report.progress(checks[-1].name)
    return checks


def stacks(
    model: str, names: Iterable[str], vocab_tokens: int, *, quick: bool
) -> tuple[list[Check], dict[str, dict[str, Any]]]:
    """Start-up and gaps of stacks: bars, and details by stack.

    Args:
        names: colocated (one worker does all) and apart (a prefill worker and a decode worker share the cores).
    """
    load = Load(vocab_tokens, **_QUICK) if quick else Load(vocab_tokens)
    checks: list[Check] = []
    details = {}
    for name in names:
        with Stack([*STACKS[name], "--model", model]) as running:
            found = gaps.measure(running.address, load)
            ready_s = dict(running.ready_s)
        report.progress(f"{name}: {len(found.quiet_s)} gaps, and {len(found.beside_prompt_s)} beside long prompts")
        checks += _bars(name, found, ready_s["decode-0"], load, decides=not quick)
        details[name] = {"ready_s": ready_s, **_details(found)}
    return checks, details


def _bars(name: str, found: Gaps, ready_s: float, load: Load, *, decides: bool) -> list[Check]:
    beside = f"beside a prompt of {load.prompt_tokens} tokens, times the undisturbed median"
    bars = [
        Check(f"{name}: seconds to a ready worker", ready_s, "<=", 10.0, decides),
        Check(f"{name}: p99 gap {beside}", found.p99_ratio, "<=", 2.5, decides),
    ]
    if name == "apart":
        # The two workers share this machine's memory and caches, so that some effect is the machine's.
        bars.append(Check(f"{name}: median gap {beside}", found.median_ratio, "<=", 1.25, decides))
    return bars


def _details(found: Gaps) -> dict[str, Any]:
    return {
        "quiet_median_s": statistics.median(found.quiet_s),
        "quiet_p99_s": gaps.percentile(found.quiet_s, 0.99),
        "beside_prompt_median_s": statistics.median(found.beside_prompt_s),
        "beside_prompt_p99_s": gaps.percentile(found.beside_prompt_s, 0.99),
        "beside_prompt_max_s": max(found.beside_prompt_s),
        "first_token_s": found.first_token_s,
    }
