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


@given(st.dictionaries(st.sampled_from(STEP_TOKENS), st.floats(0.0, 100.0), min_size=1))
def test_the_smallest_that_is_nearly_the_best(seconds: dict[int, float]) -> None:
    chosen = choose(seconds)
    rates = {tokens: tokens / max(taken, 1e-9) for tokens, taken in seconds.items()}
    assert chosen.tokens_per_s == rates[chosen.step_tokens] >= 0.95 * max(rates.values())
    assert all(rate < 0.95 * max(rates.values()) for tokens, rate in rates.items() if tokens < chosen.step_tokens)


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


def test_it_measures_every_size_that_fits_the_time(engine: Engine) -> None:
    time = FakeTime(engine, 0.02, 0.0001)
    assert measure(engine, lambda: time.now_s).step_tokens == 512
    assert time.passes == [64, 64, 64, 128, 256, 512, 64, 128, 256, 512]


def test_a_slow_machine_stays_within_the_time(engine: Engine) -> None:
    time = FakeTime(engine, 0.0, 0.002)
    assert measure(engine, lambda: time.now_s).step_tokens == 64
    assert 512 not in time.passes
    assert time.now_s - 0.128 <= saturation._TIME_S


def test_a_small_cache_bounds_it(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, blocks=2)
    time = FakeTime(engine, 0.02, 0.0)
    assert measure(engine, lambda: time.now_s).step_tokens == 128
    assert max(time.passes) == 128
