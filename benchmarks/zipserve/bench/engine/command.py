"""`zipserve bench engine`: its options, and the run from contestants to bars."""

import argparse
import itertools
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from zipserve.bench import limits, report
from zipserve.bench.engine import bars, service, table
from zipserve.bench.engine.bars import Found
from zipserve.bench.engine.contestants import PATHS
from zipserve.bench.engine.field import RIVALS, Field
from zipserve.bench.engine.vllm import preloaded
from zipserve.bench.engine.work import STORAGES, Work, kv_bytes
from zipserve.bench.kernels.cases import attention_case
from zipserve.bench.kernels.data import Heads
from zipserve.bench.report import Check
from zipserve.bench.timing import interleaved
from zipserve.common import log, models
from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC, Layout
from zipserve.common.models import ModelFiles

PARTS = ("decode", "prefill", "attention", "memory", *service.STACKS)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options(
        "engine", "Decode steps and prefill of the engine, beside rivals and the machine's limits."
    )
    number = report.whole(1)
    options.add_argument("--model", default=models.DEFAULT_MODEL, help="folder or Hugging Face id (default: SmolLM2)")
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)"
    )
    options.add_argument(
        "--codecs", nargs="+", choices=CODECS, default=["raw", DEFAULT_CODEC], help=f"default: raw {DEFAULT_CODEC}"
    )
    options.add_argument("--weights", nargs="+", choices=STORAGES, default=["float32", "bfloat16"], help="how stored")
    options.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="through the model")
    options.add_argument("--batches", nargs="+", type=number, metavar="N", help="rows (default: 1 4 8 16 32)")
    options.add_argument("--contexts", nargs="+", type=number, metavar="N", help="tokens (default: 128 1024 4096)")
    options.add_argument(
        "--prompts", nargs="+", type=number, metavar="N", help="tokens (default: 128 512 1024 2048 4096)"
    )
    options.add_argument("--rival", nargs="+", choices=RIVALS, default=[], help="who is measured in the same run")
    options.add_argument("--rival-python", type=Path, metavar="PATH", help="Python of the environment with vLLM")
    options.add_argument(
        "--rival-contexts", nargs="+", type=number, metavar="N", help="at which rivals decode (default: the shortest)"
    )
    options.add_argument("--rounds", type=number, metavar="N", help="of turns (default: 5; quick: 1)")
    options.add_argument("--steps", type=number, metavar="N", help="decode steps a turn (default: 6; quick: 2)")
    options.add_argument("--threads", type=number, metavar="T", help="CPU threads (default: all cores)")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status.

    Raises:
        InternalError: our logits differ from Hugging Face's, so that speed means nothing.
        InvalidRequestError: vLLM is wanted and does not start.
    """
    _complete(options)
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)  # of rivals and stacks too, which are our children
    torch.set_num_threads(options.threads)
    log.configure(level="error", style="console")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = models.resolve(options.model)
    found = _compete(options, files)
    checks, stacks = _serve(options, found.work)
    print(table.timings(found), end="\n\n")
    print(found.limits.text, end="\n\n")
    return report.finish(
        "engine",
        [*bars.checks(found, decides=not options.quick), *checks],
        device=report.cpu(options.threads),
        as_json=options.json,
        model=files.name,
        preloaded=preloaded(options.rival_python) if "vllm" in options.rival else {},
        limits=asdict(found.limits),
        logits_differences=found.logits_differences,
        kv_bytes={
            codec: {str(tokens): kv_bytes(layout, tokens) for tokens in options.contexts}
            for codec, layout in found.layouts.items()
        },
        seconds={
            cell.name: {name: asdict(timing) for name, timing in timings.items()}
            for cell, timings in found.results.items()
        },
        stacks=stacks,
    )


def _complete(options: argparse.Namespace) -> None:
    """Fills in what was not said.

    Raises:
        InvalidRequestError: vLLM is wanted, and its environment is not named.
    """
    quick = options.quick
    options.batches = sorted(set(options.batches or ([1, 2] if quick else [1, 4, 8, 16, 32])))
    options.contexts = sorted(set(options.contexts or ([128] if quick else [128, 1024, 4096])))
    options.prompts = sorted(set(options.prompts or ([64] if quick else [128, 512, 1024, 2048, 4096])))
    options.rival_contexts = sorted(set(options.rival_contexts or options.contexts[:1]))
    options.rounds = options.rounds or (1 if quick else 5)
    options.steps = options.steps or (2 if quick else 6)
    options.threads = options.threads or len(os.sched_getaffinity(0))
    if "vllm" in options.rival and options.rival_python is None:
        raise InvalidRequestError("rival vllm needs --rival-python", field="rival-python")


def _compete(options: argparse.Namespace, files: ModelFiles) -> Found:
    """Everything that is timed in this process and in a rival's; the models are freed at its end."""
    work, rounds = Work.of(files), 1 if options.quick else 10
    before = limits.measure(rounds)
    report.progress(before.text)
    with ExitStack() as stack:
        field = Field(options, files, stack)
        results = field.compete()
        return Found(
            results,
            # Twice, as a limit that was measured beside other load would flatter.
            before.best(limits.measure(rounds)),
            work,
            field.layouts,
            options.rival_contexts[0],
            field.logits_differences,
            _attention(field.layouts, work.heads, options) if "attention" in options.parts else {},
        )


def _attention(layouts: Mapping[str, Layout], heads: int, options: argparse.Namespace) -> dict[str, float]:
    """How many times as fast as SDPA decode attention over zipped blocks is, by case."""
    gains = {}
    contexts = [tokens for tokens in options.contexts if tokens >= 1024] or [512]
    for codec, layout in layouts.items():
        if not codec.startswith("zip-"):
            continue
        shape, rows = Heads(heads, layout.kv_heads, layout.key_dim), min(16, options.batches[-1])
        for context in contexts:
            case = attention_case(shape, codec.removeprefix("zip-"), rows=rows, context=context)
            case.require_equal()
            timings = interleaved({way: case.ways[way] for way in ("kernel", "SDPA")}, 3 * options.rounds)
            gains[case.name] = timings["SDPA"].median_s / timings["kernel"].median_s
            report.progress(case.name)
    return gains


def _serve(options: argparse.Namespace, work: Work) -> tuple[list[Check], dict[str, dict[str, Any]]]:
    """Bars of what is measured in processes of its own, and details by stack."""
    checks: list[Check] = []
    if "memory" in options.parts:
        variants = itertools.product(options.paths, options.weights)
        checks += service.resident(options.model, variants, work, decides=not options.quick)
    names = [name for name in options.parts if name in service.STACKS]
    served, stacks = service.stacks(options.model, names, work.vocab_tokens, quick=options.quick)
    return [*checks, *served], stacks
