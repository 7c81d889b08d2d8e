"""How many tokens saturate a step: the choice, and what is measured for it with a fake clock."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common import models
from zipserve.engine import loader, saturation
from zipserve.engine.cache import KvCache
from zipserve.engine.engine import Engine
from zipserve.engine.saturation import STEP_TOKENS, choose, measure

ROUNDS = st.lists(st.fixed_dictionaries({size: st.floats(0.0, 100.0) for size in STEP_TOKENS}), max_size=5)
LINEAR = {size: size * 0.001 for size in STEP_TOKENS}
"""All sizes have the same rate."""


def best_of(seconds: dict[int, float]) -> int:
    """The smallest size with nearly the best rate."""
    rates = {tokens: tokens / max(taken, 1e-9) for tokens, taken in seconds.items()}
    return next(tokens for tokens in STEP_TOKENS if rates[tokens] >= 0.95 * max(rates.values()))


@given(ROUNDS)
def test_only_what_all_rounds_agree_on_changes_the_default(rounds: list[dict[int, float]]) -> None:
    chosen, found = choose(rounds).step_tokens, [best_of(seconds) for seconds in rounds]
    if len(found) >= 3 and (max(found) < 256 or min(found) > 256):
        assert chosen in found
        assert all(abs(chosen - 256) <= abs(size - 256) for size in found)
    else:
        assert chosen == 256


def test_the_median_rate_is_told() -> None:
    rounds = [{**LINEAR, 64: taken} for taken in (0.01, 0.02, 0.03)]
    assert choose(rounds).tokens_per_s == pytest.approx(64 / 0.02)
    assert choose(rounds[:2]).tokens_per_s is None


@pytest.mark.parametrize("slow", STEP_TOKENS)
def test_one_pass_beside_other_load_does_not_decide(slow: int) -> None:
    """Neither a smaller size is taken because larger ones were held up, nor a larger one because the best was."""
    saturated_at_256 = {64: 0.1, 128: 0.18, 256: 0.3, 512: 0.6}
    rounds = [{**saturated_at_256, slow: 10 * saturated_at_256[slow]}, saturated_at_256, saturated_at_256]
    assert choose(rounds).step_tokens == 256


def engine_of(folder: Path, blocks: int) -> Engine:
    model = loader.load(models.resolve(str(folder)), "float32", "cpu")
    return Engine(model, KvCache(model.layout("zip-4/32", 64), blocks, 1, 1, 1))


class FakeTime:
    """Every forward pass takes `base_s` and `token_s` for each of its tokens."""

    def __init__(self, engine: Engine, base_s: float, token_s: float) -> None:
        self.now_s = 0.0
        self.passes: list[int] = []
        forward = engine.forward

        def timed(segments: Any) -> Any:
            tokens = len(segments[0].token_ids)
            self.passes.append(tokens)
            self.now_s += base_s + tokens * token_s
            return forward(segments)

        engine.forward = timed  # type: ignore[method-assign]


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return engine_of(tiny_model, blocks=8)


def test_it_measures_every_size_in_turn(engine: Engine) -> None:
    time = FakeTime(engine, 0.02, 0.0001)
    assert measure(engine, lambda: time.now_s).step_tokens == 512
    assert time.passes == [64, 64, *5 * STEP_TOKENS]


def test_a_smaller_step_that_is_as_good_is_taken(engine: Engine) -> None:
    time = FakeTime(engine, 0.0, 0.0001)
    found = measure(engine, lambda: time.now_s)
    assert found.step_tokens == 64
    assert found.tokens_per_s == pytest.approx(10_000)


@pytest.mark.parametrize(("token_s", "chosen", "passes"), [(0.001, 64, 4 * [64, 128, 256]), (0.002, 256, [])])
def test_a_slow_machine_stays_within_the_time(engine: Engine, token_s: float, chosen: int, passes: list[int]) -> None:
    """Where three rounds do not fit, the default stands."""
    time = FakeTime(engine, 0.0, token_s)
    assert measure(engine, lambda: time.now_s).step_tokens == chosen
    assert time.passes == [64, 64, *passes]
    assert time.now_s - 64 * token_s <= saturation._TIME_S


def test_a_machine_that_is_busy_at_first_keeps_the_default(engine: Engine) -> None:
    time = FakeTime(engine, 0.02, 0.0)
    forward, busy = engine.forward, iter([0.0, 3.0])

    def held_up(segments: Any) -> Any:
        time.now_s += next(busy, 0.0)
        return forward(segments)

    engine.forward = held_up  # type: ignore[method-assign]
    assert measure(engine, lambda: time.now_s).step_tokens == 256


@pytest.mark.parametrize(("blocks", "most"), [(2, 128), (0, 63)])
def test_a_small_cache_bounds_it(tiny_model: Path, blocks: int, most: int) -> None:
    engine = engine_of(tiny_model, blocks)
    time = FakeTime(engine, 0.02, 0.0)
    assert measure(engine, lambda: time.now_s).step_tokens == most
    assert max(time.passes, default=0) <= most
