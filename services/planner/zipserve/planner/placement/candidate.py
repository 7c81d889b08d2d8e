"""What can be built of measured workers: so many of one kind for prompts and of one for decoding, or of one for both.
Pure."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.arrangement import apart, decode_worker, prefill_worker, together
from zipserve.planner.native.cluster import Cluster
from zipserve.planner.native.profile import WorkerProfile
from zipserve.planner.native.workers import FREE_MS_DEFAULT, DecodeWorker, PrefillWorker
from zipserve.planner.placement.fleet import Fleet, taken_by

APART, TOGETHER = "apart", "together"

W = TypeVar("W", PrefillWorker, DecodeWorker)


@dataclass(frozen=True)
class Settings:
    """Of the workers of a group, where they are not as they were measured; None: as measured."""

    step_tokens: int | None = None
    slots: int | None = None
    free_ms: float = FREE_MS_DEFAULT
    """Of workers that do both: with prompts a step may take so long in any case."""

    def on(self, worker: W) -> W:
        """The worker with these settings.

        Raises:
            InvalidRequestError: it was not measured with as much.
        """
        for name, value in (("step_tokens", self.step_tokens), ("slots", self.slots)):
            most = getattr(worker, name)
            if value is not None and not 1 <= value <= most:
                raise InvalidRequestError(f"{name} of {value}: workers were measured with at most {most}", field=name)
        return replace(worker, step_tokens=self.step_tokens or worker.step_tokens, slots=self.slots or worker.slots)


@dataclass(frozen=True, eq=False)
class Group:
    """Workers of one kind."""

    profile: WorkerProfile
    replicas: int
    settings: Settings = Settings()

    @property
    def taken(self) -> Counter[str]:
        """Devices by name."""
        name, count = taken_by(self.profile)
        return Counter({name: count * self.replicas})

    def __str__(self) -> str:
        profile, own = self.profile, self.settings
        told = [profile.hardware.device, f"TP {profile.tensor}" if profile.tensor > 1 else "", profile.codec]
        told += [f"steps of {own.step_tokens}" if own.step_tokens else "", f"{own.slots} slots" if own.slots else ""]
        told.append(f"{own.free_ms:g} ms free" if own.free_ms != FREE_MS_DEFAULT else "")
        return f"{self.replicas} × ({', '.join(filter(None, told))})"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cluster that could be built."""

    prefill: Group | None
    """None: decode workers compute prompts as well."""
    decode: Group

    @property
    def arrangement(self) -> str:
        """`apart` or `together`."""
        return APART if self.prefill else TOGETHER

    @property
    def taken(self) -> Mapping[str, int]:
        """Devices by name."""
        return self.decode.taken + (self.prefill.taken if self.prefill else Counter())

    @cached_property
    def cluster(self) -> Cluster:
        """As it is simulated.

        Raises:
            InvalidRequestError: something of it was not measured, or such workers do not fit together.
        """
        decodes = [self.decode.profile] * self.decode.replicas
        if self.prefill is None:
            plain = together(decodes)
            own = Settings()
        else:
            plain = apart([self.prefill.profile] * self.prefill.replicas, decodes)
            own = self.prefill.settings
        prefills = [own.on(worker) for worker in plain.prefills]
        decode_workers = [
            replace(self.decode.settings.on(worker), free_ms=self.decode.settings.free_ms) for worker in plain.decodes
        ]
        return replace(plain, prefills=prefills, decodes=decode_workers)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of workers for prompts alone, and of the others."""
        return self.prefill.replicas if self.prefill else 0, self.decode.replicas

    def __str__(self) -> str:
        if self.prefill is None:
            return f"{self.decode} for both"
        return f"{self.prefill} for prompts and {self.decode} for decoding"


@dataclass(frozen=True)
class Refused:
    """A kind of worker that cannot be used in a role."""

    what: str
    why: str


def candidates(
    profiles: Sequence[WorkerProfile],
    fleet: Fleet,
    prefill_settings: Sequence[Settings] = (Settings(),),
    decode_settings: Sequence[Settings] = (Settings(),),
    free_ms_to_try: Sequence[float] = (FREE_MS_DEFAULT,),
) -> tuple[list[Candidate], list[Refused]]:
    """All that a fleet has the devices for, and what kinds cannot be used, with the reason."""
    uses: dict[str, Callable[[WorkerProfile], object]] = {
        "prompts": prefill_worker,
        "decoding": lambda profile: decode_worker(profile, mixes=False),
        "both": lambda profile: decode_worker(profile, mixes=True),
    }
    able: dict[str, list[WorkerProfile]] = {use: [] for use in uses}
    refused = []
    for profile in profiles:
        name, count = taken_by(profile)
        if not fleet.has({name: count}):
            there = fleet.counts.get(name, 0)
            refused.append(Refused(str(profile), f"one worker takes {count} of {name}, there are {there}"))
            continue
        for use, build in uses.items():
            try:
                build(profile)
            except InvalidRequestError as error:
                refused.append(Refused(f"{profile} for {use}:", error.message))
            else:
                able[use].append(profile)
    both = [
        Candidate(None, Group(group.profile, group.replicas, replace(group.settings, free_ms=free_ms)))
        for group in _groups(able["both"], fleet, decode_settings)
        for free_ms in free_ms_to_try
    ]
    separate = [
        Candidate(prefill, decode)
        for prefill in _groups(able["prompts"], fleet, prefill_settings)
        for decode in _groups(able["decoding"], fleet, decode_settings)
        if fits(prefill.profile, decode.profile) and fleet.has(prefill.taken + decode.taken)
    ]
    return [*both, *separate], refused


def fits(prefill: WorkerProfile, decode: WorkerProfile) -> bool:
    """Whether one can read what the other one has computed."""
    return prefill.layout.fingerprint == decode.layout.fingerprint and decode.link is not None


def _groups(profiles: Sequence[WorkerProfile], fleet: Fleet, settings: Sequence[Settings]) -> Iterator[Group]:
    for profile in profiles:
        name, count = taken_by(profile)
        for replicas in range(1, fleet.counts[name] // count + 1):
            for own in settings:
                yield Group(profile, replicas, own)
