"""`zipserve profile`: watches a cluster, under a load of its own or under what it serves anyway, writes profiles."""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from zipserve.common import log, stack_file
from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.document import read
from zipserve.planner.native.profile import Link, RoleProfile, WorkerProfile, as_document, load, save
from zipserve.planner.native.roofline import DataSheet, roofline
from zipserve.planner.profiling.assembly import Kind, file_name, kinds, profile_of
from zipserve.planner.profiling.calls import link_of, try_overhead_ms
from zipserve.planner.profiling.cluster import Cluster, ProfileSettings, Watched, opened, watching
from zipserve.planner.profiling.drive import drive

_CALLS_SHARE = 0.15
"""Of the time, for pulls, by the way through the router."""
_QUICK_S = 15.0
_QUICK_TOKENS_MAX = 600


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "zipserve profile",
        description="Learns from a running cluster how fast its workers are, and writes it into files for "
        "zipserve plan. Loads the cluster for some minutes, unless told to watch only.",
        epilog="The cluster is found by --log-dir, or by ZIPSERVE_PROFILE_REDIS_URL, …_CLUSTER and …_SECRET; TLS as "
        "its services have it: ZIPSERVE_PROFILE_TLS_CERT, …_TLS_KEY, …_TLS_CA, …_TLS_NAME.",
    )
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="the log folder of a stack that zipserve up runs")
    parser.add_argument("--redis", metavar="URL", help="Redis of the cluster")
    parser.add_argument("--cluster", metavar="NAME", help="name of the cluster in Redis (default: default)")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where profiles are written (default: .)"
    )
    parser.add_argument(
        "--base", type=Path, action="append", default=[], metavar="FILE",
        help="an older profile, for what is not measured now; may be repeated",
    )  # fmt: skip
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--minutes", type=float, default=5.0, metavar="M", help="of load, at most 10 (default: 5)")
    how_long.add_argument("--quick", action="store_true", help="15 seconds of short prompts: to try it out")
    how_long.add_argument(
        "--data-sheet", type=Path, metavar="FILE",
        help="no cluster at all: JSON of what a device promises (docs/planner.md), for the models of --base",
    )  # fmt: skip
    parser.add_argument("--live", action="store_true", help="no load of our own: learn from what is served now")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="to watch with --live (default: 60)")
    parser.add_argument(
        "--tokens-max", type=int, default=2048, metavar="N", help="longest prompt and context (default: 2048)"
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="key for the router, where it wants one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def run(options: argparse.Namespace) -> int:
    """Measures, writes and prints.

    Raises:
        ZipserveError, OSError, ValueError: an option cannot be, the cluster cannot be reached, or what it did does not
            tell how fast it is.
    """
    for name, most in (("minutes", 10), ("seconds", 86_400), ("tokens_max", 1 << 20)):
        value = getattr(options, name)
        if not 0 < value <= most:
            told = f"--{name.replace('_', '-')} {value:g} is not above 0 and at most {most}"
            raise InvalidRequestError(told, field=name)
    log.configure(level="error", style="console")
    bases = [load(path) for path in options.base]
    options.out.mkdir(parents=True, exist_ok=True)
    profiles = _promised(options, bases) if options.data_sheet else asyncio.run(_profiles(options, bases))
    paths = [options.out / file_name(profile) for profile in profiles]
    for profile, path in zip(profiles, paths, strict=True):
        save(profile, path)
    print(_as_json(profiles, paths) if options.json else "\n".join(_lines(profiles, paths)))
    return 0


def settings_of(options: argparse.Namespace) -> ProfileSettings:
    """How the cluster is found."""
    known = stack_file.read(options.log_dir) if options.log_dir else {}
    asked = {"redis_url": options.redis, "cluster": options.cluster}
    return ProfileSettings(**known | {name: value for name, value in asked.items() if value})


def _promised(options: argparse.Namespace, bases: Sequence[WorkerProfile]) -> list[WorkerProfile]:
    """Profiles of a device that nobody has measured, one for each older one."""
    if not bases:
        raise InvalidRequestError("--data-sheet says nothing of models: it needs a --base for each", field="base")
    sheet = read(DataSheet, json.loads(options.data_sheet.read_text()), "data sheet")
    return [roofline(sheet, base, _now()) for base in bases]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _profiles(options: argparse.Namespace, bases: Sequence[WorkerProfile]) -> list[WorkerProfile]:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(opened(settings_of(options)))
        links: dict[Kind, Link] = {}
        overhead_ms = None
        if options.live:
            async with watching(cluster):
                await asyncio.sleep(options.seconds)
        else:
            seconds = _QUICK_S if options.quick else 60 * options.minutes
            tokens_max = min(options.tokens_max, _QUICK_TOKENS_MAX) if options.quick else options.tokens_max
            async with watching(cluster):
                await drive(cluster, (1 - _CALLS_SHARE) * seconds, tokens_max, seed=time.time_ns())
            links = await _links(cluster, _CALLS_SHARE * seconds, tokens_max)
            key = options.api_key_file.read_text().strip() if options.api_key_file else ""
            overhead_ms = await try_overhead_ms(cluster, key)
        return [
            profile_of(those, links.get(kind), overhead_ms, _now(), _base(bases, kind))
            for kind, those in kinds(cluster.workers).items()
        ]


async def _links(cluster: Cluster, seconds: float, tokens_max: int) -> dict[Kind, Link]:
    """Between the first prefill worker and the first decode worker of each kind that reads what it writes."""
    prefill = [worker for worker in cluster.workers if worker.role == "prefill"]
    pairs: dict[Kind, tuple[Watched, Watched]] = {}
    for kind, those in kinds(cluster.workers).items():
        writers = [w for w in prefill if w.record.capabilities.writable_layout == kind[1]]
        readers = [worker for worker in those if worker.role == "decode"]
        if writers and readers:
            pairs[kind] = writers[0], readers[0]
    return {kind: await link_of(cluster, *pair, seconds / len(pairs), tokens_max) for kind, pair in pairs.items()}


def _base(bases: Sequence[WorkerProfile], kind: Kind) -> WorkerProfile | None:
    """The older profile of a kind of workers."""
    return next((base for base in bases if (base.hardware, base.layout.fingerprint) == kind), None)


def _as_json(profiles: Sequence[WorkerProfile], paths: Sequence[Path]) -> str:
    found = [{"file": str(path), **as_document(profile)} for profile, path in zip(profiles, paths, strict=True)]
    return json.dumps({"profiles": found})


def _lines(profiles: Sequence[WorkerProfile], paths: Sequence[Path]) -> list[str]:
    lines = []
    for profile, path in zip(profiles, paths, strict=True):
        lines.append(f"{profile.model} on {profile.hardware.device}, {profile.tensor}-way, {profile.codec}: {path}")
        lines += [f"  {name:8} {_of_role(role)}" for name, role in profile.roles.items()]
        if profile.link is not None:
            lines.append(f"  pulls    {profile.link.bytes_per_s / 1e6:.0f} MB/s after {profile.link.fixed_ms:.1f} ms")
        if profile.overhead_ms is not None:
            lines.append(f"  requests {profile.overhead_ms:.1f} ms besides queues and steps")
    return lines


def _of_role(role: RoleProfile) -> str:
    if not role.steps:
        return "not measured: what the device promises"
    return (
        f"{role.steps} steps of {', '.join(role.terms)}; of those that were not learned from half are off by less than "
        f"{role.error_p50:.1%}, 90 % by less than {role.error_p90:.1%}; of medians of equal ones by less than "
        f"{role.setting_error_p50:.1%} and {role.setting_error_p90:.1%}"
    )
