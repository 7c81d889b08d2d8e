"""Records as JSON and back, strictly: nothing is missing, nothing is unknown, nothing is guessed. Pure."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from zipserve.common.errors import InvalidRequestError

Floats = NDArray[np.float64]
_NAMES = {str: "text", int: "a whole number", bool: "true or false", float: "a finite number"}


def as_json(record: Any) -> Any:
    """A dataclass or named tuple of such, of mappings, tuples, arrays and plain values, as `json.dumps` takes it."""
    if isinstance(record, np.ndarray):
        return [float(value) for value in record]
    if _is_record(type(record)):
        return {name: as_json(getattr(record, name)) for name in _names(type(record))}
    if isinstance(record, Mapping):
        return {key: as_json(value) for key, value in record.items()}
    return list(map(as_json, record)) if isinstance(record, tuple) else record


def read(kind: Any, value: object, place: str) -> Any:
    """What `as_json` made of a record.

    Args:
        kind: the record's class.
        place: what an error calls it.

    Raises:
        InvalidRequestError: it is not such a record; the message names the place and the value.
    """
    if isinstance(kind, UnionType):
        (inner,) = (each for each in get_args(kind) if each is not NoneType)
        return None if value is None else read(inner, value, place)
    if get_origin(kind) is np.ndarray:
        return np.array([read(float, each, place) for each in _as(list, value, place)])
    if get_origin(kind) is tuple:
        return tuple(read(get_args(kind)[0], each, place) for each in _as(list, value, place))
    if get_origin(kind) is not None:
        found = _as(dict, value, place)
        return {key: read(get_args(kind)[1], each, f"{place}.{key}") for key, each in found.items()}
    return _read_record(kind, value, place) if _is_record(kind) else _read_plain(kind, value, place)


def _read_record(kind: Any, value: object, place: str) -> Any:
    found = _as(dict, value, place)
    names = _names(kind)
    for wrong, what in ((names.keys() - found.keys(), "is missing"), (found.keys() - names.keys(), "is unknown")):
        if wrong:
            raise InvalidRequestError(f"{place}: {sorted(wrong)[0]!r} {what}", field="profile")
    return kind(**{name: read(inner, found[name], f"{place}.{name}") for name, inner in names.items()})


def _read_plain(kind: type, value: object, place: str) -> Any:
    right = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequestError(f"{place}: {value!r} is not {_NAMES[kind]}", field="profile")
    try:
        return float(value) if kind is float else value  # type: ignore[arg-type]
    except OverflowError:
        raise InvalidRequestError(f"{place}: a number of too many digits", field="profile") from None


def _as(kind: type, value: object, place: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{place}: {value!r} is no {'list' if kind is list else 'object'}", field="profile")
    return value


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind) or hasattr(kind, "_fields")


def _names(kind: Any) -> dict[str, Any]:
    """The fields of a record, with their types."""
    hints = get_type_hints(kind)
    return {name: hints[name] for name in (getattr(kind, "_fields", None) or [field.name for field in fields(kind)])}
