"""What arrives: lengths of prompts and answers, and how the gaps between requests are spread. Pure.

Gaps are kept in units of the mean gap, so that one workload serves all rates with the same random numbers: two
placements, or two rates, are compared on the same requests.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zipserve.common.errors import InvalidRequestError


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in the order of their arrival."""

    prompts: NDArray[np.int64]
    """Tokens."""
    outputs: NDArray[np.int64]
    """Tokens to decode, the first one not counted."""
    unit_gaps: NDArray[np.float64]
    """Before each request, in mean gaps: at a rate of R per second the gap is 1000 / R times as many ms."""

    def __len__(self) -> int:
        return len(self.prompts)

    def arrivals_ms(self, rate: float) -> NDArray[np.float64]:
        """When the requests come at `rate` requests per second."""
        return np.cumsum(self.unit_gaps * 1000.0 / rate)

    def first(self, requests: int) -> "Workload":
        """The first so many.

        Raises:
            InvalidRequestError: there are fewer.
        """
        if not 1 <= requests <= len(self):
            raise InvalidRequestError(f"{requests} requests wanted, the workload has {len(self)}", field="requests")
        return Workload(self.prompts[:requests], self.outputs[:requests], self.unit_gaps[:requests])


def workload(prompts: ArrayLike, outputs: ArrayLike, gaps: ArrayLike) -> Workload:
    """Checks what a workload is made of.

    Raises:
        InvalidRequestError: there are no requests, a length is below 1, a gap is negative or not finite, or all are 0.
    """
    lengths = {"prompt": np.asarray(prompts, np.float64), "output": np.asarray(outputs, np.float64)}
    spread = np.ascontiguousarray(gaps, np.float64)
    if not len(spread):
        raise InvalidRequestError("the workload has no requests", field="trace")
    for name, tokens in lengths.items():
        _refuse(~((tokens >= 1) & (tokens == np.floor(tokens))), tokens, f"{name} length", "no whole number from 1 on")
    _refuse(~np.isfinite(spread), spread, "gap", "not finite")
    _refuse(spread < 0, spread, "gap", "negative: requests have to be in the order of their arrival")
    if len(spread) > 1 and not spread[1:].any():
        raise InvalidRequestError("all gaps are 0: such a workload has no rate", field="trace")
    whole = {name: np.ascontiguousarray(tokens, np.int64) for name, tokens in lengths.items()}
    return Workload(whole["prompt"], whole["output"], spread)


def _refuse(wrong: NDArray[np.bool_], values: NDArray[np.float64], what: str, why: str) -> None:
    if wrong.any():
        request = int(np.argmax(wrong))
        raise InvalidRequestError(f"{what} {values[request]:g} of request {request} is {why}", field="trace")
