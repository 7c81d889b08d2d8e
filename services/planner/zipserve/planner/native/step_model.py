"""How long a forward pass of one of our workers takes. Pure; compiled, because a simulation asks for every step.

Monotone by construction: no term is negative and every slope is at least 0, so that more work never takes less time.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class StepModel(NamedTuple):
    """The time of a step in ms, as a sum of what is in it.

    Knots rise from 0; a slope holds from its knot to the next one, the last one on and on. Slopes are in ms.
    """

    constant_ms: float
    token_knots: Floats
    """Tokens of prompts, and what each one more takes: projections and everything else that goes by the token."""
    token_slopes: Floats
    pair_ms: float
    """Of a prompt's token with one that it attends to."""
    row_knots: Floats
    """Sequences that decode, and what each one more takes."""
    row_slopes: Floats
    context_ms: float
    """Per token of context of the sequences that decode."""


@njit(cache=True, nogil=True)
def step_ms(model: StepModel, prompt_tokens: float, pairs: float, rows: float, context_tokens: float) -> float:
    """The time of a step in ms.

    Args:
        prompt_tokens: computed in it.
        pairs: a prompt's token with each token that it attends to, itself among them: sum over the chunks of a step
            of n * before + n * (n + 1) / 2.
        rows: sequences that decode.
        context_tokens: sum of their contexts.
    """
    return float(
        model.constant_ms
        + _height(model.token_knots, model.token_slopes, prompt_tokens)
        + model.pair_ms * pairs
        + _height(model.row_knots, model.row_slopes, rows)
        + model.context_ms * context_tokens
    )


@njit(cache=True, nogil=True)
def steps_ms(model: StepModel, prompt_tokens: Floats, pairs: Floats, rows: Floats, context_tokens: Floats) -> Floats:
    """The times of many steps, each argument [steps]."""
    found = np.empty(len(rows))
    for i in range(len(rows)):
        found[i] = step_ms(model, prompt_tokens[i], pairs[i], rows[i], context_tokens[i])
    return found


@njit(cache=True, nogil=True)
def _height(knots: Floats, slopes: Floats, x: float) -> float:
    """Of a piecewise linear curve that begins at 0."""
    height = 0.0
    last = len(knots) - 1
    for i in range(last):
        if x <= knots[i]:
            return height
        height += slopes[i] * (min(x, knots[i + 1]) - knots[i])
    return float(height + slopes[last] * max(0.0, x - knots[last]))
