"""How long steps take on a kind of device, and what an instance of a model holds, as a profile file says. Pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.chain import StepTime

DISAGGREGATED, COLOCATED = "distserve", "vllm"
"""The two sets of constants in a profile: of instances with one role, and of those that do both."""

_HOP_MS = 1.0
"""Times the number of stages: what handing a batch of prompts on costs each of them."""
_FIRST_STAGE_MS = (2.0, 1e-4)
_DECODE_TOKENS_MAX = 50_000


@dataclass(frozen=True)
class Instance:
    """One copy of a model on `tensor` × `pipeline` devices."""

    tensor: int
    pipeline: int
    step: StepTime

    @property
    def devices(self) -> int:
        """How many it occupies."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Latency:
    """Constants of a model at one tensor parallelism, in ms and tokens; see `StepTime`."""

    prefill: tuple[float, float, float]
    decode_small: tuple[float, float, float]
    decode_large: tuple[float, float, float]
    large_from: int


@dataclass(frozen=True)
class ModelProfile:
    """What was measured of one model."""

    name: str
    layers: int
    heads: int
    latencies: Mapping[tuple[str, int], Latency]
    """By set of constants and tensor parallelism."""
    prefill_tokens_max: Mapping[tuple[int, int], int]
    """By tensor and pipeline parallelism; a pair that is missing was not measured, or the model does not fit."""

    def instance(self, constants: str, tensor: int, pipeline: int) -> Instance:
        """An instance of that shape.

        Args:
            constants: `DISAGGREGATED` or `COLOCATED`.

        Raises:
            InvalidRequestError: the profile does not know it.
        """
        shape = f"{self.name} at tensor {tensor} × pipeline {pipeline}"
        latency = self.latencies.get((constants, tensor))
        if latency is None:
            known = ", ".join(str(t) for c, t in sorted(self.latencies) if c == constants) or "none"
            raise InvalidRequestError(
                f"{shape}: no step times for tensor {tensor}; there are: {known}", field="profile"
            )
        held = self.prefill_tokens_max.get((tensor, pipeline))
        if held is None:
            raise InvalidRequestError(f"{shape}: no KV capacity, so the weights do not fit", field="profile")
        return Instance(
            tensor,
            pipeline,
            StepTime(
                stages=pipeline,
                prefill=latency.prefill,
                prefill_hop=_HOP_MS * pipeline,
                decode_small=latency.decode_small,
                decode_large=latency.decode_large,
                large_from=latency.large_from,
                first_stage=_FIRST_STAGE_MS,
                prefill_tokens_max=held,
                decode_tokens_max=_DECODE_TOKENS_MAX,
            ),
        )


@dataclass(frozen=True)
class Profile:
    """All that was measured on one kind of device."""

    device: str
    models: Mapping[str, ModelProfile]

    def model(self, name: str | None) -> ModelProfile:
        """The model of that name; None: the only one.

        Raises:
            InvalidRequestError: there is no such model, or there are several.
        """
        known = ", ".join(self.models)
        if name is None:
            if len(self.models) != 1:
                raise InvalidRequestError(
                    f"the profile has {len(self.models)} models, name one: {known}", field="model"
                )
            return next(iter(self.models.values()))
        if name not in self.models:
            raise InvalidRequestError(f"the profile has no model {name!r}; there are: {known}", field="model")
        return self.models[name]


def parse_profile(document: object, device: str) -> Profile:
    """Reads a profile document (`services/planner/README.md` describes it).

    Args:
        document: parsed JSON.
        device: its name, where the document gives none.

    Raises:
        InvalidRequestError: something is missing or cannot be; the message names the place and the value.
    """
    root = _Node("profile", document)
    shapes = root.child("layers_heads")
    constants = root.child("profiles")
    capacities = root.child("max_num_tokens")
    names = list(dict.fromkeys(name for kind in constants for name in constants.child(kind)))
    if not names:
        raise InvalidRequestError("profile.profiles: it has no model", field="profile")
    given = root.value.get("device", device)
    return Profile(str(given), {name: _model(name, shapes, constants, capacities) for name in names})


class _Node:
    """An object of the document that knows where it stands."""

    def __init__(self, place: str, value: object) -> None:
        if not isinstance(value, Mapping):
            raise InvalidRequestError(f"{place}: {value!r} is no object", field="profile")
        self.place = place
        self.value: Mapping[str, Any] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def get(self, key: str) -> Any:
        if key not in self.value:
            raise InvalidRequestError(f"{self.place}: {key!r} is missing", field="profile")
        return self.value[key]

    def child(self, key: str) -> "_Node":
        return _Node(f"{self.place}.{key}", self.get(key))

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.get(key)
        if not isinstance(value, Sequence) or len(value) != count or not all(map(_is_number, value)):
            raise InvalidRequestError(f"{self.place}.{key}: {value!r} are not {count} finite numbers", field="profile")
        return tuple(float(number) for number in value)

    def whole(self, key: str) -> int:
        return _whole(self.get(key), f"{self.place}.{key}")


def _whole(value: object, place: str) -> int:
    """A whole number from 1 on, or an error that says where it stands."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequestError(f"{place}: {value!r} is no whole number from 1 on", field="profile")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _model(name: str, shapes: _Node, constants: _Node, capacities: _Node) -> ModelProfile:
    layers, heads = map(int, shapes.numbers(name, 2))
    place = f"{shapes.place}.{name}"
    latencies = {}
    for kind in constants:
        models = constants.child(kind)
        by_tensor = models.child(name) if name in models.value else _Node(models.place, {})
        for key in by_tensor:
            tensor = _parallelism(key, by_tensor.place)
            latencies[kind, tensor] = _latency(by_tensor.child(key))
    held = capacities.child(name)
    tokens = {}
    for key in held:
        first, _, second = key.partition(",")
        pair = _parallelism(first, f"{held.place}.{key}"), _parallelism(second, f"{held.place}.{key}")
        tokens[pair] = held.whole(key)
    return ModelProfile(name, _whole(layers, place), _whole(heads, place), latencies, tokens)


def _parallelism(text: str, place: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InvalidRequestError(f"{place}: {text!r} is no parallelism from 1 on", field="profile")
    return int(text)


def _latency(node: _Node) -> Latency:
    prefill = node.numbers("prefill", 3)
    small = node.numbers("decoding_smallbs", 3)
    large = node.numbers("decoding_largebs", 3)
    threshold = node.whole("decoding_large_small_bs_threshold")
    for name, (constant, per_token, third), size in (
        ("prefill", prefill, 1),
        ("decoding_smallbs", small, 1),
        ("decoding_largebs", large, threshold),
    ):
        least_ms = constant + per_token * size + third * size
        # prefill's square may be slightly negative: a fit over a range in which each prompt's own part stays positive
        if constant < 0 or per_token < 0 or (third < 0 and name != "prefill") or least_ms <= 0:
            raise InvalidRequestError(
                f"{node.place}.{name}: {constant:g}, {per_token:g} and {third:g} ms make steps of {least_ms:g} ms, or "
                "steps that get shorter with more work",
                field="profile",
            )
    return Latency(prefill, small, large, threshold)  # type: ignore[arg-type]
