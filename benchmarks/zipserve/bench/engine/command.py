"""`zipserve bench engine`: its options, and the run from contestants to bars."""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from zipserve.bench import limits, report
from zipserve.bench.engine import bars, measure
from zipserve.bench.engine.bars import PREFILL_TOKENS, Found
from zipserve.bench.engine.contestants import Contestant, HuggingFace, Own, Variant, load, load_huggingface
from zipserve.bench.engine.measure import Cell, Results
from zipserve.bench.engine.vllm import Vllm
from zipserve.bench.engine.work import STORAGES, Work, kv_bytes
from zipserve.bench.kernels.cases import attention_case
from zipserve.bench.kernels.data import Heads
from zipserve.bench.timing import interleaved
from zipserve.common import models
from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC
from zipserve.common.models import ModelFiles
from zipserve.engine.model import LoadedModel

RIVALS = ("hf", "vllm")
RIVAL_ROWS_MAX = 16
PARTS = ("decode", "prefill", "attention")
PATHS = ("fused", "generic")


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
    os.sched_setaffinity(0, cores)  # of rivals too, which are our children
    torch.set_num_threads(options.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = models.resolve(options.model)
    machine = limits.measure(10 if not options.quick else 1)
    report.progress(machine.text)
    with ExitStack() as stack:
        field = _Field(options, files, stack)
        results = field.compete()
        work = Work.of(files)
        found = Found(
            results,
            machine,
            work,
            {codec: field.model.layout(codec=codec) for codec in options.codecs},
            options.rival_contexts[0],
            _attention(field.model, work.heads, options) if "attention" in options.parts else {},
        )
    print(_table(found), end="\n\n")
    print(machine.text, end="\n\n")
    return report.finish(
        "engine",
        bars.checks(found, decides=not options.quick),
        device=report.cpu(options.threads),
        as_json=options.json,
        model=files.name,
        limits=asdict(machine),
        logits_difference=field.differences,
        kv_bytes={
            codec: {str(tokens): kv_bytes(layout, tokens) for tokens in options.contexts}
            for codec, layout in found.layouts.items()
        },
        seconds={
            cell.name: {name: asdict(timing) for name, timing in timings.items()} for cell, timings in results.items()
        },
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


class _Field:
    """The contestants: some that are measured in every cell, and others beside them in the cells of the rivals."""

    def __init__(self, options: argparse.Namespace, files: ModelFiles, stack: ExitStack) -> None:
        self._options = options
        self._steps_max = len(options.batches) * (options.rounds + 1) * (options.steps + 1)
        prompts = set(options.prompts)
        self._rival_prompts = prompts & {PREFILL_TOKENS} or prompts
        reference = load_huggingface(files)
        self._models: dict[tuple[str, str], LoadedModel] = {}
        self.differences: dict[str, float] = {}
        """Of logits to Hugging Face's, by path and weights."""
        for path in options.paths:
            for weights in options.weights:
                model = self._models[path, weights] = load(files, path, weights)
                name = f"{path} {weights}"
                self.differences[name] = measure.difference(model, reference)
                if weights == "float32":
                    measure.require_equal(name, self.differences[name])
                report.progress(f"loaded {name}, logits differ by {self.differences[name]:.2g}")
        first = (options.paths[0], options.weights[0])
        self.model = self._models[first]
        self._everywhere = [self._own(Variant(*first, codec), max(options.batches)) for codec in options.codecs]
        self._beside: list[Contestant] = [
            self._own(Variant(*other, options.codecs[0]), self._rival_rows())
            for other in self._models
            if other != first
        ]
        if "hf" in options.rival:
            self._beside += [HuggingFace(reference, attention) for attention in ("eager", "sdpa")]
        if "vllm" in options.rival:
            self._beside.append(stack.enter_context(self._vllm(files)))

    def compete(self) -> Results:
        """Runs all cells."""
        results: Results = {}
        options = self._options
        for cell in self._cells():
            contestants = [*self._everywhere, *(self._beside if self._has_rivals(cell) else ())]
            if cell.kind == "decode":
                results[cell] = measure.decode(contestants, cell, options.rounds, options.steps)
                if cell.rows == options.batches[-1]:
                    for contestant in (*self._everywhere, *self._beside):
                        contestant.drop()
            else:
                results[cell] = measure.prefill(contestants, cell, options.rounds)
            report.progress(cell.name)
        return results

    def _cells(self) -> list[Cell]:
        options = self._options
        decode = [Cell("decode", tokens, rows) for tokens in options.contexts for rows in options.batches]
        prefill = [Cell("prefill", tokens) for tokens in options.prompts]
        return [*(decode if "decode" in options.parts else ()), *(prefill if "prefill" in options.parts else ())]

    def _has_rivals(self, cell: Cell) -> bool:
        if cell.kind == "prefill":
            return cell.tokens in self._rival_prompts
        return cell.tokens in self._options.rival_contexts and cell.rows <= RIVAL_ROWS_MAX

    def _rival_rows(self) -> int:
        return max((rows for rows in self._options.batches if rows <= RIVAL_ROWS_MAX), default=1)

    def _own(self, variant: Variant, rows_max: int) -> Own:
        model = self._models[variant.path, variant.weights]
        return Own(variant, model, rows_max=rows_max, steps_max=self._steps_max)

    def _vllm(self, files: ModelFiles) -> Vllm:
        longest = max(self._options.rival_contexts[-1] + self._steps_max, *self._rival_prompts) + 8
        rows = self._rival_rows()
        report.progress("vLLM starts")
        return Vllm(
            self._options.rival_python,
            files,
            threads=self._options.threads,
            rows_max=rows,
            context_tokens=longest,
            kv_bytes=rows * kv_bytes(self.model.layout(), longest),
        )


def _attention(model: LoadedModel, heads: int, options: argparse.Namespace) -> dict[str, float]:
    """How many times as fast as SDPA decode attention over zipped blocks is, by case."""
    gains = {}
    shape = Heads(heads, model.kv_heads, model.key_dim)
    contexts = [tokens for tokens in options.contexts if tokens >= 1024] or [512]
    for codec in (codec for codec in options.codecs if codec.startswith("zip-")):
        for context in contexts:
            case = attention_case(shape, codec.removeprefix("zip-"), rows=min(16, options.batches[-1]), context=context)
            case.require_equal()
            timings = interleaved({way: case.ways[way] for way in ("kernel", "SDPA")}, 3 * options.rounds)
            gains[case.name] = timings["SDPA"].median_s / timings["kernel"].median_s
            report.progress(case.name)
    return gains


def _table(found: Found) -> str:
    """All timings, with rates, and how they stand to the first contestant and to the limits."""
    lines = []
    for cell, timings in found.results.items():
        first = next(iter(timings.values()))
        for name, timing in timings.items():
            times = (f"{seconds * 1e3:.1f}" for seconds in (timing.median_s, timing.p10_s, timing.p90_s))
            rate, ratio = f"{cell.tokens_s(timing):.1f}", f"{first.median_s / timing.median_s:.2f}"
            lines.append((cell.name, name, *times, rate, ratio, _share(found, cell, name)))
    head = ("cell", "who", "median ms", "p10", "p90", "tokens/s", "speed", "of limit")
    return report.table(head, _aligned(lines))


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """With the second column to the left too, as names are read."""
    width = max((len(line[1]) for line in lines), default=0)
    return [(line[0], line[1].ljust(width), *line[2:]) for line in lines]


def _share(found: Found, cell: Cell, name: str) -> str:
    """Of the read bandwidth in decode steps, of the multiply-add limit in prefill; rivals read float32 weights too."""
    median_s = found.results[cell][name].median_s
    if cell.kind == "prefill":
        return f"{found.work.prefill_flops(cell.tokens) / median_s / found.limits.flops_s:.0%}"
    words = name.split()
    storage = words[1] if words[0] in PATHS else "float32"
    layout = found.layouts.get(words[-1], found.layouts[next(iter(found.layouts))])
    size = found.work.decode_bytes(storage, layout, cell.rows, cell.tokens)
    return f"{size / median_s / found.limits.read_bytes_s:.0%}"
