"""`zipserve plan`: reads a profile and a workload, plans, prints."""

import argparse
import json
import re
from pathlib import Path

from zipserve.common.errors import InvalidRequestError
from zipserve.planner import report
from zipserve.planner.goal import Slo
from zipserve.planner.latency import Profile, parse_profile
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
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="step times of the devices (JSON)")
    parser.add_argument("--model", metavar="NAME", help="of the profile (default: its only one)")
    workload = parser.add_mutually_exclusive_group(required=True)
    workload.add_argument("--trace", type=Path, metavar="FILE", help="lengths, and gaps: CSV, or JSON lines (.jsonl)")
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
        "--devices", required=True, metavar="NAME:[NODES×]COUNT", help="such as a100:8, or a100:2x8 for two nodes of 8"
    )
    parser.add_argument("--rate", type=float, metavar="R", help="requests per second to serve (default: what is best)")
    parser.add_argument(
        "--rate-max", type=float, default=32.0, metavar="R",
        help="highest rate per device that is tried, in steps of a 256th (default: 32)",
    )  # fmt: skip
    parser.add_argument(
        "--search", choices=SEARCHES, default="pairs",
        help="; ".join(f"{name}: {what}" for name, what in SEARCHES.items()).replace("%", "%%") + " (default: pairs)",
    )  # fmt: skip
    parser.add_argument("--exhaustive", action="store_true", help="simulate also what cannot win")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def run(options: argparse.Namespace) -> int:
    """Plans and prints.

    Raises:
        InvalidRequestError: an option, the profile or the trace cannot be, or nothing keeps the limits.
    """
    profile = read_profile(options.profile)
    for name, rate in (("rate", options.rate), ("rate_max", options.rate_max)):
        if rate is not None and not 0 < rate < float("inf"):
            raise InvalidRequestError(f"--{name.replace('_', '-')} {rate:g} is no rate above 0", field=name)
    question = Question(
        model=profile.model(options.model),
        devices=parse_devices(options.devices, profile),
        workload=_workload(options),
        slo=Slo(options.slo_ttft, options.slo_tpot, options.attainment, not options.separate),
        search=options.search,
        rate_max=options.rate_max,
        rate=options.rate,
        prune=not options.exhaustive,
    )
    plan = make_plan(question)
    print(json.dumps(report.as_object(plan, question)) if options.json else report.as_text(plan, question))
    return 0


def read_profile(path: Path) -> Profile:
    """A profile file; its device is called what the file says, else after the file: profile_a100.json is of an a100.

    Raises:
        InvalidRequestError: it cannot be read, or is no profile.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"profile {path}: {error}", field="profile") from error
    return parse_profile(document, path.stem.removeprefix("profile_"))


def parse_devices(text: str, profile: Profile) -> Devices:
    """NAME:COUNT, or NAME:NODESxCOUNT.

    Raises:
        InvalidRequestError: it has another form, the profile is of other devices, or there are none.
    """
    name, _, count = text.rpartition(":")
    found = re.fullmatch(r"(?:(\d{1,6})[x×])?(\d{1,6})", count)
    if not name or found is None:
        raise InvalidRequestError(f"devices {text!r} are not of the form NAME:[NODES×]COUNT", field="devices")
    if name != profile.device:
        raise InvalidRequestError(
            f"no step times for device {name!r}; the profile is of {profile.device}", field="devices"
        )
    return Devices(int(found[1] or 1), int(found[2]))


def _workload(options: argparse.Namespace) -> Workload:
    if options.trace is not None:
        return read_trace(options.trace, options.arrivals, options.requests, options.seed)
    requests = _REQUESTS if options.requests is None else options.requests
    return draw(options.distribution, options.arrivals, requests, options.seed)
