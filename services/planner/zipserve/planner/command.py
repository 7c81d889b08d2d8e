"""`zipserve plan`: reads a profile and a workload, plans, prints."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zipserve.common.errors import InvalidRequestError
from zipserve.planner import report
from zipserve.planner.goal import Slo
from zipserve.planner.latency import Profile, parse_profile
from zipserve.planner.native.profile import load
from zipserve.planner.placement import command as placement
from zipserve.planner.placement import fleet
from zipserve.planner.plan import SEARCHES, Question, make_plan
from zipserve.planner.space import Devices
from zipserve.planner.trace import ARRIVALS, LENGTHS, draw, read_trace
from zipserve.planner.workload import Workload

_REQUESTS = 5_000


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "zipserve plan", description="Finds the placement with the most requests per second and device within limits."
    )
    parser.add_argument(
        "--profile", type=Path, required=True, nargs="+", metavar="FILE",
        help="step times of the devices (JSON): one file as DistServe published them, or profiles of our own workers",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="of the profile (default: its only one)")
    workload = parser.add_mutually_exclusive_group(required=True)
    workload.add_argument("--trace", type=Path, metavar="FILE", help="lengths, and gaps: CSV, or JSON lines (.jsonl)")
    workload.add_argument("--log", type=Path, metavar="FILE", help="a router's log; only with profiles of our workers")
    workload.add_argument("--distribution", metavar="D", help=f"{', '.join(LENGTHS)}, or fixed:PROMPT,OUTPUT")
    parser.add_argument(
        "--arrivals", choices=ARRIVALS, default="poisson", help="how gaps are spread; gamma comes in bursts"
    )
    parser.add_argument(
        "--requests", type=int, metavar="N", help=f"to simulate (default: the whole trace, or {_REQUESTS} drawn)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--slo-ttft", type=float, required=True, metavar="MS", help="limit on the first token")
    parser.add_argument("--slo-tpot", type=float, required=True, metavar="MS", help="limit on the mean time per token")
    parser.add_argument("--attainment", type=float, default=0.9, metavar="A", help="share of requests (default: 0.9)")
    parser.add_argument(
        "--separate", action="store_true",
        help="each limit has to hold for that percentile by itself, as published (default: that share keeps both)",
    )  # fmt: skip
    parser.add_argument(
        "--devices", required=True, nargs="+", metavar="NAME:[NODES×]COUNT",
        help="such as a100:8, or a100:2x8 for two nodes of 8; of our own workers also of several kinds, CPUs in cores",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, metavar="R", help="requests per second to serve (default: what is best)")
    parser.add_argument(
        "--rate-max", type=float, default=32.0, metavar="R",
        help="highest rate per device that is tried, of our own workers where no bound is known (default: 32)",
    )  # fmt: skip
    parser.add_argument(
        "--search", choices=SEARCHES,
        help="; ".join(f"{name}: {what}" for name, what in SEARCHES.items()).replace("%", "%%") + " (default: pairs)",
    )  # fmt: skip
    parser.add_argument("--exhaustive", action="store_true", help="simulate also what cannot win")
    placement.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def run(options: argparse.Namespace) -> int:
    """Plans and prints.

    Raises:
        InvalidRequestError: an option, the profile or the trace cannot be, or nothing keeps the limits.
    """
    for name, rate in (("rate", options.rate), ("rate_max", options.rate_max)):
        if rate is not None and not 0 < rate < float("inf"):
            raise InvalidRequestError(f"--{name.replace('_', '-')} {rate:g} is no rate above 0", field=name)
    files = _files(options.profile)
    if "version" in _read(files[0]):
        profiles = [load(path) for path in files]
        return placement.run(options, profiles, None if options.log else _workload(options))
    _refuse_own(options)
    profile = read_profile(files[0])
    question = Question(
        model=profile.model(options.model),
        devices=parse_devices(options.devices[0], profile),
        workload=_workload(options),
        slo=Slo(options.slo_ttft, options.slo_tpot, options.attainment, not options.separate),
        search=options.search or "pairs",
        rate_max=options.rate_max,
        rate=options.rate,
        prune=not options.exhaustive,
    )
    plan = make_plan(question)
    print(json.dumps(report.as_object(plan, question)) if options.json else report.as_text(plan, question))
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"profile {path}: {error}", field="profile") from error
    if not isinstance(document, dict):
        raise InvalidRequestError(f"profile {path} is no JSON object", field="profile")
    return document


def read_profile(path: Path) -> Profile:
    """A published profile; its device is called as the file says, else after it: profile_a100.json is of an a100.

    Raises:
        InvalidRequestError: it cannot be read, or is no profile.
    """
    return parse_profile(_read(path), path.stem.removeprefix("profile_"))


def _files(paths: Sequence[Path]) -> list[Path]:
    """Files, and those of folders."""
    found = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not found:
        raise InvalidRequestError(f"no profile lies in {', '.join(map(str, paths))}", field="profile")
    return found


def _refuse_own(options: argparse.Namespace) -> None:
    """What published profiles have no use for."""
    for name, told in {
        "--profile": options.profile[1:],
        "--devices": options.devices[1:],
        "--log": options.log,
        "--slo-gap": options.slo_gap,
        "--slo-gap-p99": options.slo_gap_p99,
        "--slo-e2e": options.slo_e2e,
        "--price": options.price,
        "--values": options.values,
        "--report": options.report,
        "--watch": options.watch,
        "--step-tokens": options.step_tokens != [None],
        "--slots": options.slots != [None],
        "--step-free": options.step_free != [100],
    }.items():
        if told:
            what = "several of " if name in ("--profile", "--devices") else ""
            raise InvalidRequestError(
                f"{what}{name} needs profiles of our own workers, and {options.profile[0]} is none", field=name[2:]
            )


def parse_devices(text: str, profile: Profile) -> Devices:
    """NAME:COUNT, or NAME:NODESxCOUNT.

    Raises:
        InvalidRequestError: it has another form, the profile is of other devices, or there are none.
    """
    name, nodes, per_node = fleet.parse_devices(text)
    if name != profile.device:
        raise InvalidRequestError(
            f"no step times for device {name!r}; the profile is of {profile.device}", field="devices"
        )
    return Devices(nodes, per_node)


def _workload(options: argparse.Namespace) -> Workload:
    if options.trace is not None:
        return read_trace(options.trace, options.arrivals, options.requests, options.seed)
    requests = _REQUESTS if options.requests is None else options.requests
    return draw(options.distribution, options.arrivals, requests, options.seed)
