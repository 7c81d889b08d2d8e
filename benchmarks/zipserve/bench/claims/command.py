"""`zipserve bench claims`: prefill latency, decode latency and pool size of the zip codec beside its rivals."""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from transformers.utils.logging import disable_progress_bar

from zipserve.bench import report, rows
from zipserve.bench.claims.rivals import decoded_first, full_scores
from zipserve.bench.report import Check
from zipserve.bench.rows import Rows
from zipserve.bench.timing import Timing, interleaved
from zipserve.common import models
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC, SlabKind
from zipserve.engine.model import LoadedModel
from zipserve.engine.startup import load_ready
from zipserve.kernels.saliency import probe_scores

PREFILL_GAIN = 0.373
"""ZipCache (2024), abstract: prefill latency falls by 37.3 %."""
DECODE_GAIN = 0.569
"""The same: decode latency falls by 56.9 %."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("claims", "ZipCache's claims about latency and size, side by side on a served model.")
    options.add_argument("--model", default=models.DEFAULT_MODEL, help="folder or Hugging Face id (default: SmolLM2)")
    zips = [codec for codec in CODECS if codec.startswith("zip-")]
    options.add_argument("--codec", choices=zips, default=DEFAULT_CODEC, help=f"default: {DEFAULT_CODEC}")
    options.add_argument("--prompt-tokens", type=report.whole(1), metavar="N", help="default: 4096; quick: 256")
    options.add_argument("--batch", type=report.whole(1), metavar="N", help="decode rows (default: 8; quick: 2)")
    options.add_argument("--rounds", type=report.whole(1), metavar="N", help="of timing (default: 5; quick: 1)")
    options.add_argument("--threads", type=report.whole(1), metavar="T", help="CPU threads (default: all cores)")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = models.resolve(options.model)
    model = load_ready(files, "float32", "cpu")
    tokens = options.prompt_tokens or (256 if options.quick else 4096)
    rounds = options.rounds or (1 if options.quick else 5)
    prefill, sealing_share = _prefill(model, options.codec, tokens, rounds)
    report.progress(f"prefill of {tokens} tokens")
    decode = _decode(model, options.codec, tokens, options.batch or (2 if options.quick else 8), rounds)
    report.progress("decode")
    timings = {**prefill, **decode}
    lines = [(name, *(f"{s * 1e3:.1f} ms" for s in asdict(timing).values())) for name, timing in timings.items()]
    print(report.table(("step", "median", "p10", "p90"), lines), end="\n\n")
    own, raw = model.layout(codec=options.codec), model.layout(codec="raw")
    values = own.kv_heads * (own.key_dim + own.value_dim) * own.layers * own.block_tokens
    decides = not options.quick
    checks = [
        Check("prefill: saved against full attention scores", _saved(timings, "prefill, probe rows",
              "prefill, full scores"), ">=", PREFILL_GAIN, decides),
        Check("prefill: share of saliency and quantization", sealing_share, "<=", 0.03, decides),
        Check("decode: saved against decoding first", _saved(timings, "decode, on the codes",
              "decode, decoded first"), ">=", DECODE_GAIN, decides),
        Check("decode: saved against raw float32 blocks", _saved(timings, "decode, on the codes",
              "decode, raw"), ">=", 0.0, decides),
        Check("pool: times smaller than float16", 2 * values / own.slab_bytes(SlabKind.BLOCK), ">=", 4.6, True),
    ]  # fmt: skip
    return report.finish(
        "claims", checks, device=report.cpu(torch.get_num_threads()), as_json=options.json, model=files.name,
        codec=options.codec, prompt_tokens=tokens, block_slab_bytes={"raw": raw.slab_bytes(SlabKind.BLOCK),
        options.codec: own.slab_bytes(SlabKind.BLOCK)}, timings={n: asdict(t) for n, t in timings.items()},
    )  # fmt: skip


def _saved(timings: dict[str, Timing], ours: str, theirs: str) -> float:
    return 1 - timings[ours].median_s / timings[theirs].median_s


def _prefill(model: LoadedModel, codec: str, tokens: int, rounds: int) -> tuple[dict[str, Timing], float]:
    """Timings, and the share of a prefill that saliency and quantization take."""
    engine, ids = rows.engine(model, codec, tokens, 1), rows.prompt(model.vocab_tokens, tokens)
    spent: list[float] = []

    def prefill() -> None:
        started, sealing = time.perf_counter(), _Stopwatch()
        with (
            mock.patch.object(engine.cache.codec, "write_blocks", sealing.around(engine.cache.codec.write_blocks)),
            mock.patch("zipserve.engine.probes.probe_scores", sealing.around(probe_scores)),
        ):
            rows.compute(engine, ids)
        spent.append(sealing.seconds / (time.perf_counter() - started - sealing.seconds))

    def with_full_scores() -> None:
        with full_scores():
            rows.compute(engine, ids)

    timings = interleaved({"prefill, probe rows": prefill, "prefill, full scores": with_full_scores}, rounds)
    return timings, sorted(spent)[len(spent) // 2]


def _decode(model: LoadedModel, codec: str, tokens: int, count: int, rounds: int) -> dict[str, Timing]:
    zipped, rival, raw = (
        Rows(model, name, context=tokens, rows=count, steps=rounds + 1) for name in (codec, codec, "raw")
    )

    def decoded() -> None:
        with decoded_first(rival.engine.cache):
            rival.step()

    ways: dict[str, Callable[[], object]] = {
        "decode, on the codes": zipped.step,
        "decode, decoded first": decoded,
        "decode, raw": raw.step,
    }
    blocks = torch.randn(count * (tokens // 128), model.kv_heads, 128 * model.key_dim)

    def copies() -> None:
        for _ in range(model.layers):
            torch.cat((blocks, blocks), 2)

    timings = interleaved({**ways, "copies": copies}, rounds)
    # Decoded blocks are copied into pages for attention's sake; a method that decodes into pages would not do that.
    copied_s = timings.pop("copies").median_s
    rival_s = timings["decode, decoded first"]
    timings["decode, decoded first"] = Timing(*(seconds - copied_s for seconds in asdict(rival_s).values()))
    return timings


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is added up."""

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        return timed
