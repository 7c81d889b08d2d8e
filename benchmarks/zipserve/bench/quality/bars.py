"""What codecs must reach: the limits of quality of each zip profile, and the sizes of sealed blocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zipserve.bench.quality.measure import CONTROL
from zipserve.bench.quality.summary import FP16_BITS, Summary
from zipserve.bench.report import Check

KL_OF_CONTROL_MAX = 1e-5
"""In nats per token: rounding of float32, when the same is computed in another order."""


@dataclass(frozen=True)
class Limits:
    """Of one profile, for means over windows."""

    kl_max: float
    ppl_ratio_max: float
    top1_min: float
    retrieval_min: float
    """Of the exact match's change."""
    bits_max: float | None = None
    """Of a sealed block of 8 KV heads of 128 channels."""
    compression_min: float | None = None
    """Against float16, likewise."""


LIMITS = {
    "zip-4/4": Limits(0.010, 1.025, 0.955, -0.08),
    "zip-4/3": Limits(0.012, 1.030, 0.950, -0.10),
    "zip-4/32": Limits(0.015, 1.030, 0.945, -0.14, bits_max=3.42, compression_min=4.65),
    "zip-43/32": Limits(0.023, 1.040, 0.930, -0.27, bits_max=3.18, compression_min=5.0),
    "zip-4/2": Limits(0.023, 1.040, 0.930, -0.27, bits_max=3.18, compression_min=5.0),
    "zip-3/2": Limits(0.055, 1.065, 0.895, -0.40),
}
KL_RATIOS = {"zipcache": 0.25, "int4": 1.0}
"""Most of a rival's KL that COMPARED may have, of the same windows."""
COMPARED = "zip-43/32"


def checks(summaries: Mapping[str, Summary], *, decides: bool) -> list[Check]:
    """The bars of the measured codecs.

    Args:
        decides: whether quality was measured well enough to decide; sizes and the control always do.
    """
    found = []
    if CONTROL in summaries:
        control = summaries[CONTROL]
        kl = max((abs(of_genre.value) for of_genre in control.genres.values()), default=math.nan)
        found.append(Check(f"{CONTROL} KL, any genre", kl, "<=", KL_OF_CONTROL_MAX))
    for name, limits in LIMITS.items():
        if name in summaries:
            found += _sizes(name, summaries[name].bits_8x128, limits)
            found += _quality(name, summaries[name], limits, decides)
    if COMPARED in summaries:
        for base, most in KL_RATIOS.items():
            if base in summaries:
                quotient = summaries[COMPARED].kl_ratio[base].value
                found.append(Check(f"{COMPARED} KL / {base} KL, text", quotient, "<=", most, decides))
    return found


def _sizes(name: str, bits: float, limits: Limits) -> list[Check]:
    found = []
    if limits.bits_max is not None:
        found.append(Check(f"{name} bits per value, 8x128", bits, "<=", limits.bits_max))
    if limits.compression_min is not None:
        found.append(Check(f"{name} compression of float16, 8x128", FP16_BITS / bits, ">=", limits.compression_min))
    return found


def _quality(name: str, summary: Summary, limits: Limits, decides: bool) -> list[Check]:
    return [
        Check(f"{name} KL, text", summary.kl.value, "<=", limits.kl_max, decides),
        Check(f"{name} perplexity ratio, text", summary.ppl_ratio.value, "<=", limits.ppl_ratio_max, decides),
        Check(f"{name} top-1 agreement, text", summary.top1.value, ">=", limits.top1_min, decides),
        Check(
            f"{name} exact match - fp, retrieval", summary.retrieval_match.value, ">=", limits.retrieval_min, decides
        ),
    ]
