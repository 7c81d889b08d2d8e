"""What the planner knows of a kind of worker, and the file that it is kept in (JSON). Pure, the reading of files apart.

A profile is of one model, device, parallelism and codec, with a part for each role in which such workers were measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zipserve.common.errors import InvalidRequestError, LayoutMismatchError
from zipserve.common.kv.layout import Layout, SlabKind
from zipserve.planner.native.document import as_json, read
from zipserve.planner.native.fit import TERMS
from zipserve.planner.native.step_model import Floats, StepModel

VERSION = 1
Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
_TERMS_NEEDED: dict[Role, tuple[str, ...]] = {"prefill": ("tokens", "pairs"), "decode": ("rows", "context")}


@dataclass(frozen=True)
class Hardware:
    """What a worker computes on, and with."""

    device: str
    """A short name, as it is asked for: `cpu-1`, `nvidia-h200`."""
    threads: int
    """Of the CPU; 0 where they do not matter."""
    weights: str
    """How weights are stored, as the workers' setting says."""
    pipeline: int
    """Stages."""


@dataclass(frozen=True)
class Link:
    """How KV comes from a prefill worker to a decode worker."""

    bytes_per_s: float
    """Of the read, once it has begun."""
    fixed_ms: float
    """Of each pull: calls, lease, the checks that do not go by the byte."""


@dataclass(frozen=True)
class RoleProfile:
    """What was measured of workers in one role, and their limits."""

    step: StepModel
    terms: tuple[str, ...]
    """Of the step's time, those that are known: `tokens` and `pairs` of prompts, `rows` and `context` of sequences."""
    step_tokens: int
    """Most tokens of prompts in a step."""
    slots: int
    """Most sequences in a step."""
    blocks: int
    tails: int
    steps: int
    """From how many it was learned; 0 if nobody measured it."""
    error_p50: float
    """Relative, of steps that were not learned from."""
    error_p90: float
    setting_error_p50: float
    """The same of medians of steps that did the same, without the noise of the machine."""
    setting_error_p90: float


@dataclass(frozen=True)
class WorkerProfile:
    """All about one kind of worker.

    Raises:
        InvalidRequestError: something cannot be; the message names the field and the value.
    """

    hardware: Hardware
    layout: Layout
    """Of its KV; of rank 0."""
    parameters: int
    """Of the whole model."""
    heads: int
    """Of queries, in the whole model."""
    roles: Mapping[str, RoleProfile]
    link: Link | None
    """None: nothing was pulled where it was measured."""
    overhead_ms: float | None
    """What a request's first token takes besides queues and steps: router, calls. None: not measured."""
    measured: bool
    """False: nobody did; it is what the device's data sheet promises."""
    made_at: str
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        whole = {"pipeline": self.hardware.pipeline, "parameters": self.parameters, "heads": self.heads}
        for name, value in whole.items():
            if value < 1:
                raise InvalidRequestError(f"{name}: {value}, must be at least 1", field="profile")
        if self.hardware.threads < 0 or (self.overhead_ms or 0.0) < 0:
            raise InvalidRequestError(
                f"threads {self.hardware.threads} and overhead_ms {self.overhead_ms} cannot be below 0", field="profile"
            )
        for name, role in self.roles.items():
            if name not in ROLES:
                raise InvalidRequestError(f"roles: {name!r} is none of {', '.join(ROLES)}", field="profile")
            _check_role(f"roles.{name}", role)
        if self.link is not None and (self.link.bytes_per_s <= 0 or self.link.fixed_ms < 0):
            raise InvalidRequestError(
                f"link: {self.link.bytes_per_s:g} bytes/s and {self.link.fixed_ms:g} ms cannot be", field="profile"
            )

    @property
    def model(self) -> str:
        """Id of the model."""
        return self.layout.model

    @property
    def tensor(self) -> int:
        """Degree of tensor parallelism."""
        return self.layout.ranks

    @property
    def codec(self) -> str:
        """How its KV is coded."""
        return self.layout.codec

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.layout.block_tokens

    @property
    def block_bytes(self) -> int:
        """Of a block as it travels, header included."""
        return self.layout.wire_bytes(SlabKind.BLOCK, self.block_tokens)

    @property
    def tail_bytes(self) -> int:
        """Of a tail of mean length, half a block, as it travels, and of the sinks that go with every sequence."""
        sinks = self.layout.wire_bytes(SlabKind.SINKS, self.layout.tokens_of(SlabKind.SINKS))
        return self.layout.wire_bytes(SlabKind.TAIL, self.block_tokens // 2) + sinks * self.layout.has_sinks

    def role(self, name: Role, *, mixes: bool = False) -> RoleProfile:
        """What is known of workers in a role.

        Args:
            mixes: of decode workers that also compute prompts.

        Raises:
            InvalidRequestError: it was not measured, or not everything that the role needs.
        """
        if name not in self.roles:
            raise InvalidRequestError(f"{self} has no {name} workers, only {', '.join(self.roles)}", field="profile")
        needed = TERMS if mixes else _TERMS_NEEDED[name]
        missing = [term for term in needed if term not in self.roles[name].terms]
        if missing:
            raise InvalidRequestError(
                f"{self} does not know what {', '.join(missing)} cost a {name} worker", field="profile"
            )
        return self.roles[name]

    def __str__(self) -> str:
        return f"the profile of {self.model} on {self.hardware.device}, {self.tensor}-way, {self.codec},"


def parse(document: object) -> WorkerProfile:
    """A profile from its parsed JSON.

    Raises:
        InvalidRequestError: it is of another version, a field is missing or unknown, or cannot be.
    """
    if not isinstance(document, dict) or document.get("version") != VERSION:
        version = document.get("version") if isinstance(document, dict) else None
        raise InvalidRequestError(f"a profile of version {version!r}, this reads version {VERSION}", field="profile")
    try:
        found: WorkerProfile = read(WorkerProfile, {k: v for k, v in document.items() if k != "version"}, "profile")
    except LayoutMismatchError as error:
        raise InvalidRequestError(f"profile.layout: {error.message}", field="profile") from error
    return found


def as_document(profile: WorkerProfile) -> dict[str, Any]:
    """What `parse` reads."""
    return {"version": VERSION, **as_json(profile)}


def load(path: Path) -> WorkerProfile:
    """Reads a profile's file.

    Raises:
        InvalidRequestError: it cannot be read, or is no profile; the message names it.
    """
    try:
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"profile {path}: {error}", field="profile") from error
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{path}: {error.message}", field="profile") from error


def save(profile: WorkerProfile, path: Path) -> None:
    """Writes a profile's file."""
    path.write_text(json.dumps(as_document(profile), indent=2) + "\n")


def _check_role(place: str, role: RoleProfile) -> None:
    step = role.step
    for name in ("constant_ms", "pair_ms", "context_ms"):
        if getattr(step, name) < 0:
            raise InvalidRequestError(
                f"{place}.step.{name}: {getattr(step, name):g} ms, must be 0 or more", field="profile"
            )
    _check_curve(f"{place}.step.token", step.token_knots, step.token_slopes)
    _check_curve(f"{place}.step.row", step.row_knots, step.row_slopes)
    for name in ("step_tokens", "slots", "blocks", "tails"):
        if getattr(role, name) < 1:
            raise InvalidRequestError(f"{place}.{name}: {getattr(role, name)}, must be at least 1", field="profile")
    unknown = set(role.terms) - set(TERMS)
    if unknown:
        raise InvalidRequestError(
            f"{place}.terms: {sorted(unknown)[0]!r} is none of {', '.join(TERMS)}", field="profile"
        )


def _check_curve(place: str, knots: Floats, slopes: Floats) -> None:
    if not len(knots) or len(knots) != len(slopes) or knots[0] != 0 or (np.diff(knots) <= 0).any():
        raise InvalidRequestError(
            f"{place}_knots: {len(knots)} knots with {len(slopes)} slopes; they must rise from 0, each with its slope",
            field="profile",
        )
    if slopes.min() < 0:
        raise InvalidRequestError(f"{place}_slopes: {slopes.min():g}, none may be below 0", field="profile")
