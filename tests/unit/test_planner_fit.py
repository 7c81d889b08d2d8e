"""Step models learned from steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from zipserve.common.errors import InvalidRequestError
from zipserve.common.steps import Step
from zipserve.planner.native.fit import TERMS, StepTable, Term, fit, open_terms
from zipserve.planner.native.nonnegative import solve
from zipserve.planner.native.step_model import StepModel, step_ms, steps_ms

Draw = np.random.Generator


def model(
    constant: float = 5.0,
    token_slopes: tuple[float, ...] = (0.3, 0.6),
    pair: float = 2e-4,
    row_slopes: tuple[float, ...] = (0.5, 1.5),
    context: float = 1e-3,
) -> StepModel:
    return StepModel(
        constant,
        np.array([0.0, 64.0]),
        np.array(token_slopes),
        pair,
        np.array([0.0, 8.0]),
        np.array(row_slopes),
        context,
    )


def facts(draw: Draw, count: int, kinds: tuple[str, ...] = ("prompts", "rows", "both")) -> np.ndarray:
    """[count, 4]: what is in steps of a varied load."""
    kind = draw.choice(kinds, count)
    tokens = np.where(kind == "rows", 0, draw.integers(1, 257, count))
    before = draw.integers(0, 2000, count)
    rows = np.where(kind == "prompts", 0, draw.integers(1, 33, count))
    context = rows * draw.integers(10, 2000, count)
    return np.column_stack((tokens, tokens * before + tokens * (tokens + 1) // 2, rows, context))


def steps_of(truth: StepModel, rows: np.ndarray, noise: np.ndarray) -> list[Step]:
    ms = steps_ms(truth, *rows.T.astype(float)) * noise
    return [Step(int(t), int(p), int(r), int(c), time / 1e3) for (t, p, r, c), time in zip(rows, ms, strict=True)]


def test_a_curve_rises_by_its_slopes() -> None:
    curve = model(1.0, (0.5, 0.25), 0.125, (2.0, 1.0), 0.0625)
    assert step_ms(curve, 0, 0, 0, 0) == 1.0
    assert step_ms(curve, 64, 0, 0, 0) == 1.0 + 32
    assert step_ms(curve, 68, 8, 0, 0) == 1.0 + 32 + 1 + 1
    assert step_ms(curve, 0, 0, 10, 16) == 1.0 + 16 + 2 + 1


@given(
    constant=st.floats(1, 50),
    slopes=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    pair=st.floats(1e-4, 1e-3),
    row_slopes=st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
    context=st.floats(2e-4, 2e-3),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=20)
def test_a_known_model_is_found_in_noisy_steps(
    constant: float,
    slopes: tuple[float, float],
    pair: float,
    row_slopes: tuple[float, float],
    context: float,
    seed: int,
) -> None:
    draw = np.random.default_rng(seed)
    truth = model(constant, slopes, pair, row_slopes, context)
    noise = draw.normal(1.0, 0.03, 1500)
    noise[draw.random(1500) < 0.05] *= draw.uniform(2, 20)  # somebody else had the core
    found = fit(steps_of(truth, facts(draw, 1500), noise))
    unseen = facts(draw, 400).T.astype(float)
    off = np.abs(steps_ms(found.model, *unseen) / steps_ms(truth, *unseen) - 1)
    assert np.quantile(off, 0.5) < 0.02
    assert np.quantile(off, 0.95) < 0.06
    assert found.terms == TERMS
    assert 0.01 < found.error_p50 < 0.04, "held-out errors are those of the noise"
    assert found.setting_error_p50 < found.error_p50, "which medians are spared"


counts = st.integers(0, 300)


@given(
    steps=st.lists(
        st.builds(Step, counts, st.integers(0, 10**6), counts, st.integers(0, 10**6), st.floats(1e-6, 100)),
        min_size=40,
        max_size=80,
    ),
    less=st.tuples(counts, counts, counts, counts),
    more=st.tuples(counts, counts, counts, counts),
)
def test_whatever_the_steps_say_more_work_never_takes_less(
    steps: list[Step], less: tuple[int, ...], more: tuple[int, ...]
) -> None:
    found = fit(steps, base=model()).model
    assert found.constant_ms >= 0
    assert step_ms(found, *less) <= step_ms(found, *(a + b for a, b in zip(less, more, strict=True))) + 1e-9


def test_a_prefill_worker_has_no_rows() -> None:
    draw = np.random.default_rng(1)
    truth = model()
    rows = facts(draw, 600, ("prompts",))
    found = fit(steps_of(truth, rows, draw.normal(1, 0.02, 600)))
    assert found.terms == ("tokens", "pairs")
    assert step_ms(found.model, 200, 20_100, 0, 0) == pytest.approx(step_ms(truth, 200, 20_100, 0, 0), rel=0.03)
    assert (found.model.context_ms, found.model.row_slopes.max()) == (0, 0)


def monotonous(draw: Draw, count: int) -> np.ndarray:
    """Rows and context vary, prompts are always the same."""
    rows = facts(draw, count, ("rows",))
    rows[:, 0], rows[:, 1] = 32, 32 * 33 // 2
    return rows


def test_what_never_varies_is_refused_by_its_name() -> None:
    draw = np.random.default_rng(2)
    steps = steps_of(model(), monotonous(draw, 500), draw.normal(1, 0.02, 500))
    assert open_terms(StepTable.of(steps)) == ["tokens", "pairs"]
    with pytest.raises(InvalidRequestError, match=r"tokens \(500 steps have 32 to 32\), pairs \(500 steps have 528"):
        fit(steps)


def test_a_former_model_fills_in_what_is_left_open() -> None:
    draw = np.random.default_rng(3)
    now = model(context=3e-3)
    found = fit(steps_of(now, monotonous(draw, 500), draw.normal(1, 0.02, 500)), base=model())
    assert found.terms == TERMS
    assert found.model.pair_ms == model().pair_ms
    assert found.model.context_ms == pytest.approx(3e-3, rel=0.05), "what the steps tell is theirs"
    assert step_ms(found.model, 200, 20_100, 4, 4000) == pytest.approx(step_ms(now, 200, 20_100, 4, 4000), rel=0.05)


def test_a_former_model_that_does_not_know_it_either_fills_nothing_in() -> None:
    draw = np.random.default_rng(6)
    rows = monotonous(draw, 500)
    decoding = model()._replace(token_slopes=np.zeros(len(model().token_slopes)), pair_ms=0.0)
    with pytest.raises(InvalidRequestError, match="do not tell what these cost: tokens"):
        fit(steps_of(model(), rows, draw.normal(1, 0.02, 500)), base=decoding)


def test_context_that_only_grows_with_the_rows_is_left_open() -> None:
    draw = np.random.default_rng(4)
    rows = facts(draw, 400, ("rows",))
    rows[:, 3] = 100 * rows[:, 2]
    terms: list[Term] = open_terms(StepTable.of(steps_of(model(), rows, draw.normal(1, 0.02, 400))))
    assert terms == ["rows", "context"]


def test_few_steps_are_no_measure() -> None:
    with pytest.raises(InvalidRequestError, match="3 steps are no measure, it takes at least 24"):
        fit([Step(1, 1, 0, 0, 0.1)] * 3)


numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


@given(data=st.data(), unknowns=st.integers(1, 6), equations=st.integers(1, 12))
def test_the_nearest_solution_without_negative_parts(data: st.DataObject, unknowns: int, equations: int) -> None:
    A = data.draw(arrays(float, (equations, unknowns), elements=numbers))
    b = data.draw(arrays(float, equations, elements=numbers))
    x = solve(A, b)
    assert (x >= 0).all()
    # Karush, Kuhn, Tucker: no part can grow and help, and those above 0 cannot shrink and help
    helps = A.T @ (b - A @ x) / (np.linalg.norm(A, axis=0) + 1e-12)
    least = 1e-6 * (1 + np.linalg.norm(b))
    assert helps.max() <= least
    assert np.abs(helps[x > 0]).max(initial=0) <= least
