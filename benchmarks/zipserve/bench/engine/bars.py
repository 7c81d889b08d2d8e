"""The bars of `zipserve bench engine`, for as much as was measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zipserve.bench.engine.contestants import Variant
from zipserve.bench.engine.measure import Cell, Results
from zipserve.bench.engine.work import Work, kv_bytes
from zipserve.bench.limits import Limits
from zipserve.bench.report import Check
from zipserve.common.kv.layout import Layout

VLLM_GAINS = {1: 2.5, 8: 2.5, 16: 2.0}
"""Times vLLM's tokens per second, by rows."""
PACKED_GAIN = 1.6
PREFILL_TOKENS = 1024
EXACT = Variant("fused", "float32", "raw")
"""What is compared with rivals: the same weights, activations and KV as theirs."""


@dataclass(frozen=True)
class Found:
    """Everything that was measured."""

    results: Results
    limits: Limits
    work: Work
    layouts: Mapping[str, Layout]
    """Of each codec."""
    rival_context: int
    """Context at which rivals decode."""
    logits_differences: Mapping[str, float]
    """Greatest ones to Hugging Face's, by path and storage of weights."""
    attention_gain: Mapping[str, float]
    """Times as fast as SDPA, by case."""

    def gain(self, cell: Cell, ours: Variant, theirs: str) -> float | None:
        """How many times faster we are; None where one of both was not measured."""
        timings = self.results.get(cell, {})
        of_rival = [timing.median_s for name, timing in timings.items() if name.startswith(theirs)]
        if ours.name not in timings or not of_rival:
            return None
        return min(of_rival) / timings[ours.name].median_s


def checks(found: Found, *, decides: bool) -> list[Check]:
    """Of everything that was measured; a smoke run's decide nothing."""
    bars = [*_against_rivals(found), *_against_limits(found), *_of_codecs(found)]
    return [Check(name, value, ">=", bound, decides) for name, value, bound in bars if value is not None]


_Bars = Iterator[tuple[str, float | None, float]]


def _against_rivals(found: Found) -> _Bars:
    packed, half = Variant("packed", "float32", "raw"), Variant("fused", "bfloat16", "raw")
    for rows, bound in VLLM_GAINS.items():
        cell = Cell("decode", found.rival_context, rows)
        yield f"{cell.name}: times vLLM's tokens/s", found.gain(cell, EXACT, "vLLM"), bound
        yield f"{cell.name}: packed path, times vLLM's tokens/s", found.gain(cell, packed, "vLLM"), PACKED_GAIN
    single, prompt = Cell("decode", found.rival_context), Cell("prefill", PREFILL_TOKENS)
    yield f"{single.name}: bfloat16 weights, times vLLM's tokens/s", found.gain(single, half, "vLLM"), 4.5
    yield f"{prompt.name}: times vLLM's tokens/s", found.gain(prompt, EXACT, "vLLM"), 1.5
    yield f"{prompt.name}: times Hugging Face's tokens/s", found.gain(prompt, EXACT, "Hugging Face"), 1.7


def _against_limits(found: Found) -> _Bars:
    for cell, timings in found.results.items():
        if EXACT.name not in timings or (cell.kind, cell.rows) not in (("decode", 1), ("prefill", 1)):
            continue
        median_s = timings[EXACT.name].median_s
        if cell.kind == "decode" and cell.tokens == found.rival_context:
            size = found.work.decode_bytes(EXACT.weights, found.layouts[EXACT.codec], 1, cell.tokens)
            yield f"{cell.name}: share of the read bandwidth", size / median_s / found.limits.read_bytes_s, 0.75
        if cell.kind == "prefill" and cell.tokens == PREFILL_TOKENS:
            flops = found.work.prefill_flops(cell.tokens)
            yield f"{cell.name}: share of the multiply-add limit", flops / median_s / found.limits.flops_s, 0.8


def _of_codecs(found: Found) -> _Bars:
    """Of zip codecs against raw blocks, with rows and contexts that are worth a codec."""
    for cell in found.results:
        if cell.kind != "decode" or cell.rows != 16 or cell.tokens < 1024:
            continue
        for codec, layout in found.layouts.items():
            if not codec.startswith("zip-"):
                continue
            gain = found.gain(cell, Variant(EXACT.path, EXACT.weights, codec), EXACT.name)
            yield f"{cell.name}: {codec}, times raw's tokens/s", gain, 1.0
            if EXACT.codec in found.layouts:
                smaller = kv_bytes(found.layouts[EXACT.codec], cell.tokens) / kv_bytes(layout, cell.tokens)
                yield f"{cell.name}: {codec}, times smaller than raw", smaller, 4.5
    for name, value in found.attention_gain.items():
        yield f"{name}: times as fast as SDPA", value, 3.0
