"""`zipserve bench prefix`: prompts that begin alike, on whole stacks as `zipserve up` starts them."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from zipserve.bench import report
from zipserve.bench.prefix import workloads
from zipserve.bench.prefix.client import Answer
from zipserve.bench.prefix.workloads import Elsewhere, Pressure, Size
from zipserve.bench.report import Check
from zipserve.common import models
from zipserve.common.kv.layout import CODECS, DEFAULT_CODEC, SlabKind
from zipserve.engine.model import LoadedModel
from zipserve.engine.startup import load_ready

PARTS = ("elsewhere", "chat", "pressure")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = report.options("prefix", "Prompts that begin alike: what finding their blocks saves, wherever these are.")
    options.add_argument("--model", default=models.DEFAULT_MODEL, help="folder or Hugging Face id (default: SmolLM2)")
    options.add_argument(
        "--codecs", nargs="+", choices=CODECS, default=["raw", DEFAULT_CODEC], metavar="CODEC",
        help=f"of the prompts that another worker has computed (default: raw {DEFAULT_CODEC})",
    )  # fmt: skip
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help="elsewhere: a prompt that another worker has computed; chat: turns of a conversation; pressure: four "
        "times what the store's memory holds (default: all)",
    )  # fmt: skip
    options.add_argument("--rounds", type=report.whole(1), metavar="N", help="of `elsewhere` (default: 3; quick: 1)")
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    files = models.resolve(options.model)
    model = load_ready(files, "float32", "cpu")
    size = workloads.QUICK if options.quick else Size()
    if options.rounds:
        size = Size(**{**asdict(size), "rounds": options.rounds})
    arguments = ["--model", options.model]
    checks: list[Check] = []
    details: dict[str, object] = {}
    for codec in options.codecs if "elsewhere" in options.parts else ():
        found = workloads.elsewhere([*arguments, "--codec", codec], model.vocab_tokens, size)
        report.progress(f"{codec}: prompts that another worker has computed")
        checks += _of_elsewhere(codec, found, model, size, decides=not options.quick)
        details[f"elsewhere, {codec}"] = asdict(found)
    if "chat" in options.parts:
        answers = workloads.chat(arguments, size)
        report.progress("a chat")
        checks += _of_chat(answers, model.layout(codec=DEFAULT_CODEC).block_tokens, decides=not options.quick)
        details["chat"] = [asdict(answer) for answer in answers]
    if "pressure" in options.parts:
        layout = model.layout(codec=DEFAULT_CODEC)
        pressed = workloads.pressure(
            arguments, model.vocab_tokens, layout.block_tokens, layout.slab_bytes(SlabKind.BLOCK), size
        )
        report.progress("more prompts than memory holds")
        checks += _of_pressure(pressed, layout.block_tokens, decides=not options.quick)
        details["pressure"] = asdict(pressed)
    print(report.table(("request", "prompt", "cached", "first token"), _lines(details)), end="\n\n")
    return report.finish(
        "prefix", checks, device=report.cpu(0), as_json=options.json, model=files.name, workloads=details
    )


def _of_elsewhere(codec: str, found: Elsewhere, model: LoadedModel, size: Size, *, decides: bool) -> Iterator[Check]:
    name = f"{codec}: {size.prompt_tokens} tokens that another worker has computed"
    blocks = (size.prompt_tokens - 1) // model.layout(codec=codec).block_tokens
    yield Check(f"{name}: share of the first time to first token", found.share, "<=", 0.25, decides)
    yield Check(
        f"{name}: blocks fetched, of those that there are", found.fetched_blocks / (blocks * size.rounds), ">=", 1.0
    )
    if codec == "raw":
        yield Check(f"{name}: share of tokens that are the same", found.agreement, ">=", 1.0)
    else:
        yield Check(f"{name}: share of tokens that are the same", found.agreement, ">=", 0.0, decides=False)


def _of_chat(answers: Sequence[Answer], block_tokens: int, *, decides: bool) -> Iterator[Check]:
    later = answers[1:]
    share = workloads.hit_share(later, block_tokens)
    yield Check(f"chat of {len(answers)} turns: share of full blocks found, from turn 2 on", share, ">=", 0.9, decides)
    computed = [answer.prompt_tokens - answer.cached_tokens for answer in later]
    of_all = sum(computed) / sum(answer.prompt_tokens for answer in later)
    yield Check(
        f"chat of {len(answers)} turns: share of prompt tokens computed, from turn 2 on", of_all, "<=", 0.25, decides
    )


def _of_pressure(found: Pressure, block_tokens: int, *, decides: bool) -> Iterator[Check]:
    name = "four times the store's memory"
    hits = workloads.hit_share(found.again, block_tokens)
    yield Check(f"{name}: share of full blocks found", hits, ">=", 0.9, decides)
    yield Check(f"{name}: blocks brought from disk", found.promoted_blocks, ">=", 1.0, decides)
    yield Check(f"{name}: time to first token, as a share of computing it", found.share, "<=", 1.0, decides)


def _lines(details: dict[str, object]) -> Iterator[tuple[str, str, str, str]]:
    for part, found in details.items():
        groups = found.items() if isinstance(found, dict) else [("turn", found)]
        for group, answers in groups:
            for number, answer in enumerate(answers if isinstance(answers, list) else (), 1):
                first_token_s = answer["first_token_s"] or math.nan
                yield (
                    f"{part}: {group} {number}",
                    str(answer["prompt_tokens"]),
                    str(answer["cached_tokens"]),
                    f"{first_token_s * 1e3:.0f} ms",
                )
