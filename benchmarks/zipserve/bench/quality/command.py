"""`zipserve bench quality`: its options, and the run from texts to bars."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from zipserve.bench import report
from zipserve.bench.quality import bars, texts
from zipserve.bench.quality.measure import Batch
from zipserve.bench.quality.metrics import Score
from zipserve.bench.quality.retrieval import lookups
from zipserve.bench.quality.summary import summarize, tables
from zipserve.bench.quality.windows import RETRIEVAL, Encode, Shape, Window, retrieval_window, text_windows
from zipserve.common import models
from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import CODECS
from zipserve.engine.model import LoadedModel
from zipserve.engine.startup import load_ready

FULL, QUICK = Shape(), Shape(context_tokens=256, scored_tokens=64, queries=4)
WINDOWS = {False: 8, True: 1}
GREEDY_TOKENS = {False: 16, True: 8}
"""By whether the run is quick."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("quality", "What each KV codec costs: KL, perplexity, agreement, retrieval, and bits.")
    options.add_argument(
        "--texts", type=Path, nargs="+", default=[texts.shipped()], metavar="PATH",
        help="text files (.txt, or .jsonl with question and answer, or text) or folders; a genre each "
        "(default: the public-domain texts that ship)",
    )  # fmt: skip
    options.add_argument(
        "--windows", type=report.whole(1), metavar="N", help="windows per genre (default: 8; quick: 1)"
    )
    options.add_argument(
        "--offset", type=report.whole(0), default=0, metavar="N", help="number of the first window (default: 0)"
    )
    options.add_argument("--seed", type=int, default=0, help="draws the look-ups (default: 0)")
    options.add_argument("--greedy-tokens", type=report.whole(0), metavar="N",
                         help="generated per window of text (default: 16; quick: 8)")  # fmt: skip
    options.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS), metavar="CODEC",
                         help=f"what is measured (default: {' '.join(CODECS)})")  # fmt: skip
    options.add_argument("--model", default=models.DEFAULT_MODEL, help="folder or Hugging Face id (default: SmolLM2)")
    options.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    options.add_argument("--threads", type=report.whole(1), metavar="T", help="CPU threads (default: all cores)")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status.

    Raises:
        ZipserveError: model, texts or options cannot be measured.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = models.resolve(options.model)
    shape = QUICK if options.quick else FULL
    genres = _windows(options, shape, _encoder(files.folder))
    model = load_ready(files, "float32", options.device)
    layouts = {codec: model.layout(codec=codec) for codec in options.codecs}
    started = time.monotonic()
    results: dict[str, dict[str, list[Score]]] = {codec: {} for codec in options.codecs}
    for genre, codec, scores in _measure(model, genres, options):
        results[codec][genre] = scores
        report.progress(f"{time.monotonic() - started:5.0f} s  {genre}  {codec}")
    summaries = summarize(results, layouts, shape.context_tokens)
    print(tables(summaries), end="\n\n")
    return report.finish(
        "quality",
        bars.checks(summaries, decides=not options.quick),
        device=report.cpu(torch.get_num_threads()) if model.device.type == "cpu" else _gpu(model.device),
        as_json=options.json,
        model=files.name,
        revision=files.revision,
        windows={genre: len(of_genre) for genre, of_genre in genres.items()},
        settings={"offset": options.offset, "seed": options.seed, "greedy_tokens": _greedy_tokens(options),
                  **asdict(shape)},
        results={codec: asdict(summary) for codec, summary in summaries.items()},
    )  # fmt: skip


def _windows(options: argparse.Namespace, shape: Shape, encode: Encode) -> dict[str, list[Window]]:
    count = options.windows or WINDOWS[options.quick]
    genres = {
        genre: text_windows(genre, encode(text).ids, shape, options.offset, count)
        for genre, text in texts.load(options.texts, reserved={RETRIEVAL}).items()
    }
    numbers = range(options.offset, options.offset + count)
    retrieval = [retrieval_window(lookups(options.seed, number), encode, shape) for number in numbers]
    return {**genres, RETRIEVAL: retrieval}


def _measure(
    model: LoadedModel, genres: dict[str, list[Window]], options: argparse.Namespace
) -> Iterator[tuple[str, str, list[Score]]]:
    """Genre, codec, and the scores of the genre's windows."""
    for genre, windows in genres.items():
        # What follows look-ups says nothing: there the queries are what counts.
        batch = Batch(model, windows, options.codecs, 0 if genre == RETRIEVAL else _greedy_tokens(options))
        for codec in options.codecs:
            yield genre, codec, batch.scores(codec)


def _greedy_tokens(options: argparse.Namespace) -> int:
    return GREEDY_TOKENS[options.quick] if options.greedy_tokens is None else int(options.greedy_tokens)


def _encoder(folder: Path) -> Encode:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidRequestError(f"model folder {folder} has no fast tokenizer (tokenizer.json)", field="model")
    backend.no_truncation()
    backend.no_padding()
    return lambda text: backend.encode(text, add_special_tokens=False)


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else str(device)
