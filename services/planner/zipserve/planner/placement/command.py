"""`zipserve plan` with profiles of our own workers: from options to a question, and from the answer to files."""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.objectives import GapObjective, Objective, Slo
from zipserve.planner.native.profile import WorkerProfile
from zipserve.planner.native.traffic import Traffic, extras
from zipserve.planner.placement import plot, report
from zipserve.planner.placement.candidate import APART, TOGETHER, Settings
from zipserve.planner.placement.curves import Curve, curve, rates_about
from zipserve.planner.placement.fleet import Fleet, parse_devices
from zipserve.planner.placement.router_log import Logged, read_log
from zipserve.planner.placement.search import Question, Ranking, search
from zipserve.planner.placement.values import as_yaml, values
from zipserve.planner.placement.watch import News, Watch
from zipserve.planner.workload import Workload

_SEEDS_MAX = 100
_WATCHED = 2_000
"""Latest requests of a log that are compared, if nothing else is said."""

V = TypeVar("V")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that only plans of measured workers have."""
    own = parser.add_argument_group("with profiles of our own workers (zipserve profile)")
    own.add_argument("--slo-gap", type=float, metavar="MS", help="limit on every gap between two tokens of a request")
    own.add_argument("--slo-gap-p99", type=float, metavar="MS", help="limit on 99 %% of all gaps")
    own.add_argument("--slo-e2e", type=float, metavar="MS", help="limit on a whole request")
    own.add_argument("--price", action="append", default=[], metavar="NAME=P", help="of a device for an hour")
    own.add_argument("--seeds", type=int, default=5, metavar="N", help="draws of the arrivals (default: 5)")
    own.add_argument("--step-tokens", type=_numbers, default=[None], metavar="N,N", help="to try")
    own.add_argument("--slots", type=_numbers, default=[None], metavar="N,N", help="to try")
    own.add_argument(
        "--step-free", type=_numbers, default=[100], metavar="MS,MS", help="step_free_s to try, of workers that do both"
    )
    own.add_argument("--values", type=Path, metavar="FILE", help="write the best one for the Helm chart")
    own.add_argument(
        "--watch", type=float, metavar="S",
        help="with --log: look at it every so many seconds, and tell when other values would serve what comes better",
    )  # fmt: skip
    own.add_argument(
        "--headroom", type=float, default=1.2, metavar="X", help="of --watch: plan for so much of what comes"
    )
    own.add_argument("--report", type=Path, metavar="FILE", help="write curves: .png, or .html with the words")


def run(options: argparse.Namespace, profiles: Sequence[WorkerProfile], workload: Workload | None) -> int:
    """Plans, prints, and writes the files that were asked for.

    Args:
        workload: None: it is read from the log that the options name.

    Raises:
        InvalidRequestError: an option cannot be, or nothing keeps the limits.
    """
    logged = None
    if workload is None:
        if options.watch is not None and options.requests is None:
            options.requests = _WATCHED
        logged = read_log(options.log, options.requests)
        workload = logged.traffic
    question = _question(options, profiles, extras(workload))
    if options.watch is not None:
        question = _watched(options, question, logged)
    _check_files(options)
    ranking = search(question)
    curves = _curves(ranking, question) if options.report or options.json else []
    words = report.as_text(ranking, question)
    print(json.dumps(report.as_object(ranking, question, curves)) if options.json else words)
    best = ranking.best()
    assert best is not None
    if options.values:
        options.values.write_text(as_yaml(values(best.candidate), words))
    if options.report:
        plot.save(options.report, ranking, question, curves)
    if options.watch is not None and logged is not None:
        _watch(options, Watch(question, ranking, logged.rate, options.headroom))
    return 0


def _watched(options: argparse.Namespace, question: Question, logged: Logged | None) -> Question:
    """What is planned for while a log is watched: its own rate, and some more."""
    for name, value in (("watch", options.watch), ("headroom", options.headroom)):
        if not 0 < value < math.inf:
            raise InvalidRequestError(f"--{name} {value:g} is no number above 0", field=name)
    if logged is None or question.rate is not None:
        raise InvalidRequestError("--watch takes requests and rate from --log, and no --rate", field="watch")
    return replace(question, rate=options.headroom * logged.rate)


def _watch(options: argparse.Namespace, watch: Watch) -> None:
    """Tells of shifts until it is interrupted."""
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(options.watch)
            try:
                news = watch.look(read_log(options.log, options.requests))
            except InvalidRequestError as error:
                news = News((error.message,))
            if options.json:
                print(json.dumps({"shifts": news.shifts, "replan": news.replan}), flush=True)
            elif news.shifts:
                print(f"shifted: {'; '.join(news.shifts)}\n{news.replan}".rstrip(), flush=True)


def _check_files(options: argparse.Namespace) -> None:
    """Before a long search, and not after it."""
    if options.report:
        plot.check_path(options.report)
    for name in ("values", "report"):
        path: Path | None = getattr(options, name)
        if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidRequestError(f"--{name} {path} cannot be written", field=name)


def _question(options: argparse.Namespace, profiles: Sequence[WorkerProfile], traffic: Traffic) -> Question:
    models = sorted({profile.model for profile in profiles})
    if len(models) > 1:
        raise InvalidRequestError(f"the profiles are of several models: {', '.join(models)}", field="profile")
    if not 1 <= options.seeds <= _SEEDS_MAX:
        raise InvalidRequestError(f"--seeds {options.seeds} is not in [1, {_SEEDS_MAX}]", field="seeds")
    if options.model not in (None, *models):
        raise InvalidRequestError(f"the profiles are of {models[0]}, not of {options.model}", field="model")
    if options.search is not None:
        raise InvalidRequestError(
            "--search is for published profiles; here all arrangements are looked at", field="search"
        )
    settings = tuple(Settings(*each) for each in itertools.product(options.step_tokens, options.slots))
    return Question(
        profiles=profiles,
        fleet=Fleet(_once("devices", map(_device, options.devices)), _once("price", map(_price, options.price))),
        traffic=traffic,
        slo=_slo(options),
        rate_max=options.rate_max,
        rate=options.rate,
        seeds=range(options.seed, options.seed + options.seeds),
        arrivals=options.arrivals,
        prefill_settings=settings,
        decode_settings=settings,
        free_ms_to_try=options.step_free,
        prune=not options.exhaustive,
    )


def _slo(options: argparse.Namespace) -> Slo:
    limits = {
        "ttft_ms": options.slo_ttft,
        "tpot_ms": options.slo_tpot,
        "gap_ms": options.slo_gap,
        "e2e_ms": options.slo_e2e,
    }
    told = {name: limit for name, limit in limits.items() if limit not in (None, math.inf)}
    share = options.attainment
    together: list[Objective | GapObjective] = [Objective(**told, share=share)] if told else []
    if options.separate:
        together = [Objective(**{name: limit}, share=share) for name, limit in told.items()]
    gaps = [] if options.slo_gap_p99 is None else [GapObjective(options.slo_gap_p99, 0.99)]
    return Slo(*together, *gaps)


def _curves(ranking: Ranking, question: Question) -> list[Curve]:
    best = [found for found in (ranking.best(TOGETHER), ranking.best(APART)) if found is not None]
    rates = rates_about([found.rate for found in best])
    return [curve(found.candidate, question, rates) for found in best]


def _once(name: str, pairs: Iterable[tuple[str, V]]) -> dict[str, V]:
    found: dict[str, V] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidRequestError(f"{name} of {key} are told twice", field=name)
        found[key] = value
    return found


def _device(text: str) -> tuple[str, int]:
    name, nodes, per_node = parse_devices(text)
    return name, nodes * per_node


def _price(text: str) -> tuple[str, float]:
    name, _, price = text.partition("=")
    try:
        return name, float(price)
    except ValueError:
        raise InvalidRequestError(f"price {text!r} is not of the form NAME=NUMBER", field="price") from None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
