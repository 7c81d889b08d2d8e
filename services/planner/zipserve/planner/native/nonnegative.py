"""Least squares whose solution has no negative part: of errors as they are, or of relative ones on noisy data. Pure."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
_ROUNDS = 12
_FAR = 2.0
"""Beyond so many standard deviations an equation counts for less, the farther the less."""


def solve_robust(A: Floats, b: Floats, known: Floats | float = 0.0, shares: Floats | float = 1.0) -> Floats:
    """The x >= 0 for which A x + known is nearest to b + known in relative terms, whatever a few of them say.

    Args:
        A: [equations, unknowns]
        b: [equations], above 0 together with what is known.
        known: [equations], a part that is fixed.
        shares: [equations], how much each counts.
    """
    whole = b + known
    predicted, weights = whole, shares * np.ones(len(b))
    found = np.zeros(A.shape[1])
    for _ in range(_ROUNDS):
        scale = np.sqrt(weights) / predicted
        found = solve(A * scale[:, None], b * scale)
        predicted = np.maximum(A @ found + known, 1e-6)
        off = np.abs(whole / predicted - 1)
        deviation = max(1.4826 * float(np.median(off)), 1e-6)
        weights = shares * np.minimum(1.0, _FAR * deviation / np.maximum(off, 1e-12))
    return found


def solve(A: Floats, b: Floats) -> Floats:
    """The x >= 0 for which A x is nearest to b.

    Args:
        A: [equations, unknowns], equations at least 1.
        b: [equations]
    """
    scale = np.linalg.norm(A, axis=0)
    scale[scale == 0] = 1.0
    if not A.shape[1]:
        return np.zeros(0)
    # the same problem in as many equations as there are unknowns
    R = np.linalg.qr(np.column_stack((A / scale, b))).R
    found: Floats = nnls(R[:, :-1], R[:, -1])[0] / scale
    return found
