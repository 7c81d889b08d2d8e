"""A workload with what only our own cluster cares for: what is cached of each prompt, and classes of requests. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zipserve.common.errors import InvalidRequestError
from zipserve.planner.workload import Workload

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Traffic(Workload):
    """Requests in the order of their arrival."""

    cached: Ints
    """Tokens of each prompt that whoever computes it has already; less than the prompt."""
    found: Ints
    """Blocks of each prompt that the decode worker has already, and does not pull."""
    classes: Ints
    """From 0 on; objectives may hold for one only."""

    def first(self, requests: int) -> "Traffic":
        """The first so many; raises as a workload does."""
        return traffic(super().first(requests), self.cached[:requests], self.found[:requests], self.classes[:requests])

    def refusal(self, block_tokens: int) -> str:
        """Why what is cached can not be; empty if it can."""
        for name, tokens, most in (
            ("cached", self.cached, self.prompts - 1),  # at least the last one is computed
            ("found", self.found * block_tokens, self.prompts),
        ):
            wrong = tokens > most
            if wrong.any():
                request = int(np.argmax(wrong))
                return f"{tokens[request]} tokens of request {request} are {name}, at most {most[request]} can be"
        return ""


def traffic(workload: Workload, cached: ArrayLike = 0, found: ArrayLike = 0, classes: ArrayLike = 0) -> Traffic:
    """A workload with more columns; one number stands for all requests.

    Raises:
        InvalidRequestError: a column has another length, or a negative or broken number.
    """
    columns = {"cached": cached, "found": found, "classes": classes}
    whole = {name: _column(name, values, len(workload)) for name, values in columns.items()}
    return Traffic(workload.prompts, workload.outputs, workload.unit_gaps, **whole)


def extras(workload: Workload) -> Traffic:
    """The workload itself if it has these columns, else with nothing cached, and one class."""
    return workload if isinstance(workload, Traffic) else traffic(workload)


def _column(name: str, values: ArrayLike, requests: int) -> Ints:
    column = np.asarray(values, np.float64)
    if column.ndim and column.shape != (requests,):
        raise InvalidRequestError(f"{name} has {column.size} numbers for {requests} requests", field=name)
    if not np.all((column >= 0) & (column == np.floor(column))):
        raise InvalidRequestError(f"{name} has a number that is negative or not whole", field=name)
    return np.ascontiguousarray(np.broadcast_to(column, (requests,)), np.int64)
