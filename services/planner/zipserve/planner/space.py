"""Which placements a model has on given devices, and why others are none. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.latency import COLOCATED, DISAGGREGATED, Instance, ModelProfile
from zipserve.planner.simulation import Placement, refusal
from zipserve.planner.workload import Workload

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Devices:
    """What there is to place on."""

    nodes: int
    per_node: int

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.per_node < 1:
            raise InvalidRequestError(
                f"{self.nodes} nodes of {self.per_node} devices are no devices to place anything on", field="devices"
            )

    @property
    def total(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node


@dataclass
class Space:
    """Placements that can serve a workload, and those that cannot, each with the reason."""

    placements: list[Placement] = field(default_factory=list)
    infeasible: list[tuple[Shape, str]] = field(default_factory=list)


def pairs(model: ModelProfile, devices: Devices, workload: Workload) -> Space:
    """One prefill and one decode instance, anywhere: their KV crosses whatever link lies between."""
    shapes = list(_shapes(model, devices.per_node, devices.total))
    found = ((1, p, d) for p in shapes for d in shapes if p[0] * p[1] + d[0] * d[1] <= devices.total)
    return _checked(model, workload, found)


def paired(model: ModelProfile, devices: Devices, workload: Workload) -> Space:
    """Both instances cut into as many segments; a node holds one of each, so that KV never leaves it."""
    found = (
        (segments, p, d)
        for segments in range(1, devices.nodes + 1)
        for p in _shapes(model, devices.per_node, devices.per_node, segments)
        for d in _shapes(model, devices.per_node, devices.per_node, segments)
        if p[0] * p[1] + d[0] * d[1] <= devices.per_node
    )
    return _checked(model, workload, found)


def colocated(model: ModelProfile, devices: Devices, workload: Workload) -> Space:
    """One instance that does both."""
    space = Space()
    for tensor, pipeline in _shapes(model, devices.per_node, devices.total):
        _add(space, (tensor, pipeline), model, workload, (None, None, (COLOCATED, tensor, pipeline)))
    return space


def phase(model: ModelProfile, devices: Devices, workload: Workload, *, prefill: bool) -> Space:
    """One instance of one phase."""
    space = Space()
    for tensor, pipeline in _shapes(model, devices.per_node, devices.total):
        wanted = (DISAGGREGATED, tensor, pipeline)
        parts = (wanted, None, None) if prefill else (None, wanted, None)
        _add(space, (tensor, pipeline), model, workload, parts)
    return space


def _shapes(model: ModelProfile, tensor_max: int, devices_max: int, segments: int = 1) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) that divide heads and layers; the latter are shared by segments first."""
    for tensor in range(1, min(tensor_max, devices_max) + 1):
        for pipeline in range(1, devices_max // tensor + 1):
            if model.heads % tensor == 0 and model.layers % (pipeline * segments) == 0:
                yield tensor, pipeline


Wanted = tuple[str, int, int] | None


def _checked(
    model: ModelProfile, workload: Workload, found: Iterable[tuple[int, tuple[int, int], tuple[int, int]]]
) -> Space:
    space = Space()
    for segments, (tensor, pipeline), (decode_tensor, decode_pipeline) in found:
        shape = segments, tensor, pipeline, decode_tensor, decode_pipeline
        parts = (
            (DISAGGREGATED, tensor, pipeline * segments),
            (DISAGGREGATED, decode_tensor, decode_pipeline * segments),
            None,
        )
        _add(space, shape, model, workload, parts, segments)
    return space


def _add(
    space: Space,
    shape: Shape,
    model: ModelProfile,
    workload: Workload,
    parts: tuple[Wanted, Wanted, Wanted],
    segments: int = 1,
) -> None:
    try:
        prefill, decode, both = (_instance(model, part) for part in parts)
    except InvalidRequestError as error:
        space.infeasible.append((shape, error.message))
        return
    placement = Placement(prefill, decode, both, segments)
    why = refusal(placement, workload)
    if why:
        space.infeasible.append((shape, why))
    else:
        space.placements.append(placement)


def _instance(model: ModelProfile, wanted: Wanted) -> Instance | None:
    return None if wanted is None else model.instance(*wanted)
