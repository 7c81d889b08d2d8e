"""The devices that there are, and what a worker takes of them. Pure."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.native.profile import WorkerProfile

CPU = "cpu"
"""Counted in cores: a worker of two threads takes two."""


@dataclass(frozen=True)
class Fleet:
    """Devices by name.

    Raises:
        InvalidRequestError: there are none, or a price is none.
    """

    counts: Mapping[str, int]
    prices: Mapping[str, float] = field(default_factory=dict)
    """Of one device for an hour, in whatever money; 1 where it is not told, so that all devices count the same."""

    def __post_init__(self) -> None:
        for name, count in self.counts.items():
            if count < 1:
                raise InvalidRequestError(f"{count} devices of {name} are none", field="devices")
        if not self.counts:
            raise InvalidRequestError("there are no devices", field="devices")
        for name, price in self.prices.items():
            if name not in self.counts:
                raise InvalidRequestError(f"a price for {name}, of which there are no devices", field="price")
            if not 0 < price < math.inf:
                raise InvalidRequestError(f"a price of {price:g} for {name} is none above 0", field="price")

    def cost(self, taken: Mapping[str, int]) -> float:
        """Of these devices for an hour."""
        return sum(count * self.prices.get(name, 1.0) for name, count in taken.items())

    def has(self, taken: Mapping[str, int]) -> bool:
        """Whether there are so many."""
        return all(count <= self.counts.get(name, 0) for name, count in taken.items())


def parse_devices(text: str) -> tuple[str, int, int]:
    """Name, nodes and devices per node, from NAME:COUNT or NAME:NODESxCOUNT.

    Raises:
        InvalidRequestError: it has another form.
    """
    name, _, count = text.rpartition(":")
    found = re.fullmatch(r"(?:(\d{1,6})[x×])?(\d{1,6})", count)
    if not name or found is None:
        raise InvalidRequestError(f"devices {text!r} are not of the form NAME:[NODES×]COUNT", field="devices")
    return name, int(found[1] or 1), int(found[2])


def taken_by(profile: WorkerProfile) -> tuple[str, int]:
    """Name of the device of such a worker, and how many it takes."""
    hardware = profile.hardware
    if hardware.threads:
        return CPU, hardware.threads * profile.tensor
    return hardware.device, profile.tensor * hardware.pipeline
