"""How zipserve's workers share out the cores: by name, as written on the command line, or by the file of a plan. Pure,
but for reading that file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zipserve.common.errors import InvalidRequestError
from zipserve.common.kv.layout import CODECS

_SETTING = re.compile(r"(router|prefill|decode|kvstore)\.[a-z]\w*")

_LEAST = {"prefill": 0, "decode": 1, "threads": 1}


@dataclass(frozen=True)
class Arrangement:
    """Workers, each with cores of its own."""

    name: str
    prefill: int
    """Prefill workers; without any, the decode workers compute the prompts, in chunks."""
    decode: int
    threads: int = 1
    """Of each worker, a core for each."""
    codec: str | None = None
    """Of KV blocks. None: that of all arrangements."""
    settings: tuple[tuple[str, str], ...] = ()
    """Others of a service: its name and the field's as `zipserve up --set` takes them, and the value."""

    def __post_init__(self) -> None:
        """
        Raises:
            InvalidRequestError: it cannot be served.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise self._refused(name, f"{value!r}, no whole number from {least} on")
        if self.codec is not None and self.codec not in CODECS:
            raise self._refused("codec", f"{self.codec!r}, none of {', '.join(CODECS)}")
        for setting, _ in self.settings:
            if not _SETTING.fullmatch(setting):
                raise self._refused("settings", f"{setting!r}, no SERVICE.FIELD")

    def _refused(self, field: str, what: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.name}: {field} is {what}", field=field)

    @property
    def devices(self) -> int:
        """Cores that it computes on."""
        return (self.prefill + self.decode) * self.threads

    def up(self, model: str, codec: str, sequences: int) -> list[str]:
        """Arguments of `zipserve up`; `sequences` are most at once of a worker whose settings say nothing else."""
        sizes = {"prefill": self.prefill, "decode": self.decode, "threads": self.threads}
        arguments = [f"--{name}={value}" for name, value in sizes.items()]
        both = {f"{role}.sequences_max": str(sequences) for role in ("prefill", "decode")}
        settings = [f"--set={setting}={value}" for setting, value in {**both, **dict(self.settings)}.items()]
        return [*arguments, f"--model={model}", f"--codec={self.codec or codec}", *settings]

    def cores(self, available: Sequence[int]) -> dict[str, list[int]]:
        """Cores of each worker, by its id.

        Raises:
            InvalidRequestError: there are not enough.
        """
        if self.devices > len(available):
            raise InvalidRequestError(
                f"{self.name} needs {self.devices} cores, {len(available)} are there", field="arrangements"
            )
        workers = [*(f"prefill-{i}" for i in range(self.prefill)), *(f"decode-{i}" for i in range(self.decode))]
        firsts = range(0, self.devices, self.threads)
        return {
            worker: list(available[first : first + self.threads]) for worker, first in zip(workers, firsts, strict=True)
        }


def known(cores: int) -> dict[str, Arrangement]:
    """Those with a name, on so many cores."""
    return {
        arrangement.name: arrangement
        for arrangement in (
            Arrangement("replicas", 0, cores),
            Arrangement("whole", 0, 1, cores),
            *([Arrangement("apart", 1, cores - 1)] if cores > 1 else []),
        )
    }


def parse(text: str, cores: int) -> Arrangement:
    """From `NAME`, or `NAME:FIELD=VALUE,…`, where fields are those of a plan's file, and SERVICE.FIELD.

    A known name's fields hold where nothing else is said; so that `apart:decode.step_tokens=64` is a variant of it.

    Raises:
        InvalidRequestError: it is nothing of the kind.
    """
    name, colon, rest = text.partition(":")
    start = known(cores).get(name)
    if not colon:
        if start is None:
            raise InvalidRequestError(f"{name!r} is none of {', '.join(known(cores))}", field="arrangements")
        return start
    values: dict[str, Any] = {"name": text, "settings": {}}
    for part in rest.split(","):
        field, equals, value = part.partition("=")
        if not equals:
            raise InvalidRequestError(f"{text!r}: {part!r} is not of the form FIELD=VALUE", field="arrangements")
        if "." in field:
            values["settings"][field] = value
        else:
            values[field] = int(value) if value.isdecimal() else value
    return _of(values, text, start)


def read_plan(path: Path) -> Arrangement:
    """From JSON: what `zipserve plan --json` prints, or `name` (optional), `prefill`, `decode`, `threads`, `codec`, and
    `settings` by SERVICE.FIELD.

    Raises:
        InvalidRequestError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidRequestError(f"{path} is no JSON: {error}", field="plan") from error
    if not isinstance(values, dict):
        raise InvalidRequestError(f"{path} has no object of an arrangement", field="plan")
    planned = _planned(values["best"], str(path)) if "best" in values else values
    return _of({"name": "planned", **planned}, str(path), None)


def _planned(best: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of what was planned, where all of it computes on cores of one machine."""
    groups = {role: best[role] for role in ("prefill", "decode") if role in best}
    cores = {re.fullmatch(r"cpu-(\d+)", str(group["device"])) for group in groups.values()}
    threads = {found[1] for found in cores if found is not None}
    if None in cores or len(threads) != 1:
        raise InvalidRequestError(f"{where}: only workers of equally many cores each can be run here", field="plan")
    settings = {
        f"{role}.{setting}": group[name]
        for role, group in groups.items()
        for name, setting in (("step_tokens", "step_tokens"), ("slots", "sequences_max"))
        if group.get(name)
    }
    if "prefill" not in groups:
        settings["decode.step_free_s"] = groups["decode"]["free_ms"] / 1000
    replicas = {role: groups[role]["replicas"] if role in groups else 0 for role in ("prefill", "decode")}
    return {**replicas, "threads": int(threads.pop()), "codec": groups["decode"]["codec"], "settings": settings}


def _of(values: Mapping[str, Any], where: str, start: Arrangement | None) -> Arrangement:
    fields = {"name", "prefill", "decode", "threads", "codec", "settings"}
    if unknown := sorted(values.keys() - fields):
        raise InvalidRequestError(f"{where}: {unknown[0]!r} is none of {', '.join(sorted(fields))}", field=unknown[0])
    missing = sorted({"prefill", "decode"} - values.keys()) if start is None else []
    if missing:
        raise InvalidRequestError(f"{where} lacks {missing[0]}", field=missing[0])
    settings = values.get("settings", {})
    if not isinstance(settings, Mapping):
        raise InvalidRequestError(f"{where}: settings are no object", field="settings")
    given = {**values, "settings": tuple((name, str(value)) for name, value in settings.items())}
    return replace(start, **given) if start is not None else Arrangement(**given)
