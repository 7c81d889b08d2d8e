"""Learns a `StepModel` from steps that workers have noted. Pure.

Least squares of relative errors, over piecewise linear curves whose slopes cannot be negative, so that every model is
monotone. Machines are noisy: what lies far off counts for little, and a setting that has come a thousand times does not
drown the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from zipserve.common.errors import InvalidRequestError
from zipserve.common.steps import Step
from zipserve.planner.native.nonnegative import Floats, solve_robust
from zipserve.planner.native.step_model import StepModel, steps_ms

Term = Literal["tokens", "pairs", "rows", "context"]
TERMS: tuple[Term, ...] = get_args(Term)
STEPS_MIN = 24
_KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
_SEGMENT_STEPS_MIN = 8
_SEGMENT_SHARE_MIN = 0.05
"""Of the steps that have some of it: a segment of few bends to their noise."""
_OPEN_MAX = 0.5
"""What a term makes of a step's time may be unsure by this share of it, one standard deviation."""
_FOLDS = 5
_REPEATS_MIN = 4
"""Of a setting, for its median to say more than a step does."""


@dataclass(frozen=True)
class StepTable:
    """Steps as columns, all float64 [steps]."""

    tokens: Floats
    pairs: Floats
    rows: Floats
    context: Floats
    ms: Floats

    @classmethod
    def of(cls, steps: Sequence[Step]) -> "StepTable":
        """Steps that took no time are no measure and left out."""
        facts = [(s.prompt_tokens, s.pairs, s.rows, s.context_tokens, 1e3 * s.seconds) for s in steps if s.seconds > 0]
        return cls(*np.array(facts, np.float64).reshape(-1, 5).T)

    def __len__(self) -> int:
        return len(self.ms)

    def column(self, term: Term) -> Floats:
        """How much there is in each step of what a term counts."""
        column: Floats = getattr(self, term)
        return column

    def some(self, which: object) -> "StepTable":
        """Those of an index or mask."""
        return StepTable(*(column[which] for column in vars(self).values()))

    def predicted_ms(self, model: StepModel) -> Floats:
        """What a model says of each step."""
        found: Floats = steps_ms(model, self.tokens, self.pairs, self.rows, self.context)
        return found


@dataclass(frozen=True)
class Fit:
    """A model, and how it was found."""

    model: StepModel
    terms: tuple[Term, ...]
    """Those that the steps, or a model before this one, determine; the others are 0, and no step had any of them."""
    steps: int
    error_p50: float
    """Relative, of steps that a fit to the others has not seen: half of them are off by less."""
    error_p90: float
    setting_error_p50: float
    """The same of the medians of steps that did the same: the machine's noise is mostly left out."""
    setting_error_p90: float


def fit(steps: Sequence[Step], base: StepModel | None = None) -> Fit:
    """Fits a model to steps.

    Args:
        base: has those terms that the steps leave open.

    Raises:
        InvalidRequestError: there are too few steps, or they leave a term open and there is no base.
    """
    table = StepTable.of(steps)
    if len(table) < STEPS_MIN:
        raise InvalidRequestError(f"{len(table)} steps are no measure, it takes at least {STEPS_MIN}", field="steps")
    present = [term for term in TERMS if table.column(term).any()]
    left_open = open_terms(table)
    if unknown := [term for term in left_open if base is None or not _has(base, term)]:
        raise InvalidRequestError(_told(table, unknown), field="steps")
    wanted = [term for term in present if term not in left_open]
    model = _fitted(table, wanted, base)
    ratios = _unseen_ratios(table, wanted, base)
    of_settings = _medians(ratios, np.round(2 * _settings(table)))
    terms = tuple(term for term in TERMS if term in present or (base is not None and _has(base, term)))
    return Fit(model, terms, len(table), *_errors(ratios), *_errors(of_settings if len(of_settings) else ratios))


def open_terms(table: StepTable) -> list[Term]:
    """Terms that are in the steps, but of which they do not tell what they cost: it never varies, or only together with
    something else."""
    present = [term for term in TERMS if table.column(term).any()]
    columns = [np.ones(len(table)), *(table.column(term) for term in present)]
    A = np.column_stack(columns) / table.ms[:, None]
    A /= np.abs(A).max(axis=0)
    solution = np.linalg.lstsq(A, np.ones(len(table)), rcond=None)[0]
    residual = np.abs(A @ solution - 1)
    deviation = max(1.4826 * float(np.median(residual)), 1e-3)
    found: list[Term] = []
    for index, term in enumerate(present, start=1):
        others = np.delete(A, index, axis=1)
        alone = A[:, index] - others @ np.linalg.lstsq(others, A[:, index], rcond=None)[0]
        # columns are at most 1: that is how far the term's part of a step's time may be off
        if deviation >= _OPEN_MAX * np.linalg.norm(alone):
            found.append(term)
    return found


def _told(table: StepTable, terms: Sequence[Term]) -> str:
    parts = []
    for term in terms:
        column = table.column(term)
        some = column[column > 0]
        parts.append(f"{term} ({len(some)} steps have {some.min():.0f} to {some.max():.0f})")
    return (
        f"{len(table)} steps do not tell what these cost: {', '.join(parts)}; they vary too little, or only with each "
        "other. Serve a more varied load, or give a profile that has them"
    )


def _has(model: StepModel, term: Term) -> bool:
    return {
        "tokens": bool(model.token_slopes.any()),
        "pairs": model.pair_ms > 0,
        "rows": bool(model.row_slopes.any()),
        "context": model.context_ms > 0,
    }[term]


def _only(model: StepModel, terms: Sequence[Term]) -> StepModel:
    """A model of these terms, the others 0."""
    return StepModel(
        constant_ms=0.0,
        token_knots=model.token_knots,
        token_slopes=model.token_slopes * ("tokens" in terms),
        pair_ms=model.pair_ms * ("pairs" in terms),
        row_knots=model.row_knots,
        row_slopes=model.row_slopes * ("rows" in terms),
        context_ms=model.context_ms * ("context" in terms),
    )


@dataclass(frozen=True)
class _Curve:
    """A piecewise linear curve: its knots, and what each segment adds at each step."""

    knots: Floats
    first: int
    """Segments before this one have no steps of their own, and rise by nothing."""
    columns: Floats
    """[steps, segments from the first one on]"""

    @classmethod
    def over(cls, x: Floats) -> "_Curve":
        """With as many knots as the steps at x support."""
        knots = [0.0]
        first = int(x.min() > 0)  # where every step has some of it, the way up from 0 is part of the constant
        if first:
            knots.append(float(x.min()))
        least = max(_SEGMENT_STEPS_MIN, _SEGMENT_SHARE_MIN * (x > 0).sum())
        for knot in _KNOTS:
            below = ((x > knots[-1]) & (x <= knot)).sum()
            if below >= least and (x > knot).sum() >= least:
                knots.append(float(knot))
        starts = np.array(knots)
        lengths = np.append(np.diff(starts), np.inf)
        return cls(starts, first, np.clip(x[:, None] - starts, 0.0, lengths)[:, first:])

    def slopes(self, found: Floats) -> Floats:
        """Of all segments."""
        return np.append(np.zeros(self.first), found)


def _fitted(table: StepTable, wanted: Sequence[Term], base: StepModel | None) -> StepModel:
    """The model whose wanted terms fit best, and whose others are those of the base."""
    kept = _only(base, [term for term in TERMS if term not in wanted]) if base is not None else None
    nothing = np.zeros(len(table))
    tokens = _Curve.over(table.tokens if "tokens" in wanted else nothing)
    rows = _Curve.over(table.rows if "rows" in wanted else nothing)
    A = np.column_stack(
        (
            np.ones(len(table)),
            table.pairs if "pairs" in wanted else nothing,
            table.context if "context" in wanted else nothing,
            tokens.columns,
            rows.columns,
        )
    )
    known_ms = table.predicted_ms(kept) if kept is not None else nothing
    found = solve_robust(A, table.ms - known_ms, known_ms, _shares(table))
    of_tokens, of_rows = np.split(found[3:], [tokens.columns.shape[1]])
    take_tokens, take_rows = "tokens" in wanted or kept is None, "rows" in wanted or kept is None
    return StepModel(
        constant_ms=float(found[0]),
        token_knots=tokens.knots if take_tokens else kept.token_knots,  # type: ignore[union-attr]
        token_slopes=tokens.slopes(of_tokens) if take_tokens else kept.token_slopes,  # type: ignore[union-attr]
        pair_ms=float(found[1]) + (kept.pair_ms if kept else 0.0),
        row_knots=rows.knots if take_rows else kept.row_knots,  # type: ignore[union-attr]
        row_slopes=rows.slopes(of_rows) if take_rows else kept.row_slopes,  # type: ignore[union-attr]
        context_ms=float(found[2]) + (kept.context_ms if kept else 0.0),
    )


def _shares(table: StepTable) -> Floats:
    """How much each step counts: of a setting (within a factor of two) that came n times, 1 / sqrt(n)."""
    _, which, counts = np.unique(np.ceil(_settings(table)), axis=0, return_inverse=True, return_counts=True)
    return np.asarray(1 / np.sqrt(counts[which.reshape(-1)]))


def _settings(table: StepTable) -> Floats:
    """What was in each step, in powers of two, [steps, terms]."""
    return np.column_stack([np.log2(1 + table.column(term)) for term in TERMS])


def _unseen_ratios(table: StepTable, wanted: Sequence[Term], base: StepModel | None) -> Floats:
    """What each step took, in units of what a fit to the steps of other folds says."""
    folds = np.arange(len(table)) % _FOLDS
    ratios = np.empty(len(table))
    for fold in range(_FOLDS):
        unseen = table.some(folds == fold)
        ratios[folds == fold] = unseen.ms / unseen.predicted_ms(_fitted(table.some(folds != fold), wanted, base))
    return ratios


def _medians(ratios: Floats, settings: Floats) -> Floats:
    """Of each setting that came at least a few times."""
    _, which, counts = np.unique(settings, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    return np.array([np.median(ratios[which == i]) for i in np.flatnonzero(counts >= _REPEATS_MIN)])


def _errors(ratios: Floats) -> tuple[float, float]:
    """50th and 90th percentile of relative errors, without sign."""
    p50, p90 = np.quantile(np.abs(1 / ratios - 1), (0.5, 0.9))
    return float(p50), float(p90)
