"""The contestants of one run, and the cells in which they meet."""

import argparse
from contextlib import ExitStack

from zipserve.bench import report
from zipserve.bench.engine import measure
from zipserve.bench.engine.bars import PREFILL_TOKENS
from zipserve.bench.engine.contestants import Contestant, HuggingFace, Own, Variant, load, load_huggingface
from zipserve.bench.engine.measure import Cell, Results
from zipserve.bench.engine.vllm import Vllm
from zipserve.bench.engine.work import kv_bytes
from zipserve.common.kv.layout import Layout
from zipserve.common.models import ModelFiles
from zipserve.engine import startup
from zipserve.engine.model import LoadedModel

RIVALS = ("hf", "vllm")
RIVAL_ROWS_MAX = 16


class Field:
    """The contestants: some that are measured in every cell, and others beside them in the cells of the rivals."""

    def __init__(self, options: argparse.Namespace, files: ModelFiles, stack: ExitStack) -> None:
        self._options = options
        self._steps_max = len(options.batches) * (options.rounds + 1) * (options.steps + 1)
        prompts = set(options.prompts)
        self._rival_prompts = prompts & {PREFILL_TOKENS} or prompts
        reference = load_huggingface(files)
        self._models: dict[tuple[startup.Path, startup.Weights], LoadedModel] = {}
        self.logits_differences: dict[str, float] = {}
        """Of logits to Hugging Face's, by path and weights."""
        for path in options.paths:
            for weights in options.weights:
                model = self._models[path, weights] = load(files, path, weights)
                name = f"{path} {weights}"
                self.logits_differences[name] = measure.difference(model, reference)
                if weights == "float32":
                    measure.require_equal(name, self.logits_differences[name])
                report.progress(f"loaded {name}, logits differ by {self.logits_differences[name]:.2g}")
        first = (options.paths[0], options.weights[0])
        self.layouts: dict[str, Layout] = {codec: self._models[first].layout(codec=codec) for codec in options.codecs}
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
            medians = ", ".join(f"{name} {timing.median_s * 1e3:.1f}" for name, timing in results[cell].items())
            report.progress(f"{cell.name}, ms: {medians}")
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
            kv_bytes=rows * kv_bytes(self._models[next(iter(self._models))].layout(), longest),
        )
