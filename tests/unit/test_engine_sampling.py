"""Sampling: keyed by position, independent of the batch, and of the right distribution."""

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zipserve.common.sampling import Sampling
from zipserve.engine import sampling
from zipserve.engine.sampling import Sampler, uniform

# Few distinct values: ties are what goes wrong.
logit_rows = st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=12).filter(
    lambda row: max(row) > -math.inf
)
all_params = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 5.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, (1 << 64) - 1),
    min_p=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
positions = st.integers(0, 1 << 20)
FLOAT32 = 1e-6
"""Probabilities are computed in float32, and summed in float64."""


def sample(logits: torch.Tensor, params: SequenceOf[Sampling], positions: SequenceOf[int]) -> list[int]:
    return sampling.sample(logits, [Sampler(of_row) for of_row in params], positions)


def one(logits: list[float], params: Sampling, position: int) -> int:
    return sample(torch.tensor([logits]), [params], [position])[0]


def kept(logits: list[float], params: Sampling) -> dict[int, float]:
    """The filtered distribution by definition, in float64: token -> probability, by rising id."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    top = max(logits)
    weights = {token: math.exp((logits[token] - top) / params.temperature) for token in order}
    weights = dict(list(weights.items())[: params.top_k or None])
    total, reached, nucleus = sum(weights.values()), 0.0, {}
    for token, weight in weights.items():
        nucleus[token] = weight
        reached += weight
        if reached >= params.top_p * total:
            break
    likely = {token: weight for token, weight in nucleus.items() if weight >= params.min_p}  # the highest weight is 1
    return {token: likely[token] / sum(likely.values()) for token in sorted(likely)}


@given(logit_rows, all_params, positions)
@settings(deadline=None)
def test_inverse_cdf_of_the_filtered_distribution(logits: list[float], params: Sampling, position: int) -> None:
    token = one(logits, params, position)
    if params.temperature == 0.0:
        assert token == logits.index(max(logits))
        return
    expected, share, reached = kept(logits, params), uniform(params.seed, position), 0.0
    assert token in expected
    assert expected[token] > 0.0
    for candidate, probability in expected.items():
        if candidate == token:
            assert reached - FLOAT32 <= share <= reached + probability + FLOAT32
        reached += probability


@given(logit_rows, all_params, positions)
@settings(deadline=None)
def test_top_k_of_one_is_greedy(logits: list[float], params: Sampling, position: int) -> None:
    one_token = Sampling(params.temperature, 1, params.top_p, params.seed)
    assert one(logits, one_token, position) == one(logits, Sampling(temperature=0.0), position)


@given(st.lists(st.tuples(st.integers(0, 7), all_params, positions), min_size=1, max_size=6))
@settings(deadline=None)
def test_a_row_does_not_depend_on_the_others(rows: list[tuple[int, Sampling, int]]) -> None:
    logits = torch.randn((8, 300), generator=torch.Generator().manual_seed(0))
    together = sample(logits[[index for index, _, _ in rows]], [row[1] for row in rows], [row[2] for row in rows])
    alone = [sample(logits[index : index + 1], [params], [position])[0] for index, params, position in rows]
    assert together == alone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0, 3, 255, 256, 300, 5000]), st.sampled_from([0.3, 0.99, 1.0]), positions)
def test_the_short_way_gives_the_same_token(seed: int, top_k: int, top_p: float, position: int) -> None:
    """Sorting only the most likely tokens must never change the result, ties at the border included."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn((1, 9000), generator=generator) * [1, 4, 20][seed % 3] * 4).round() / 4
    params = [Sampling(temperature=1.0, top_k=top_k, top_p=top_p, seed=seed)]
    short = sample(logits, params, [position])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_CANDIDATES", ())
        assert sample(logits, params, [position]) == short


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def sort_all(_logits: object, count: int) -> None:
        raise AssertionError(f"{count} tokens were asked for")

    logits = torch.linspace(-1, 1, 9000)[None].clone()
    logits[0, ::40] = 12.0
    real = sampling._most_likely
    monkeypatch.setattr(sampling, "_most_likely", lambda row, n: real(row, n) if n < 9000 else sort_all(row, n))
    for params in (Sampling(seed=3, top_p=0.9), Sampling(seed=3, top_k=40), Sampling(seed=3, top_k=1000, top_p=0.5)):
        assert sample(logits, [params], [7])[0] % 40 == 0, params


def test_distribution_over_positions() -> None:
    count = 20_000
    logits = torch.tensor([[1.0, -1.0, 0.0, 2.0, -math.inf, 0.0]])
    expected = (logits[0] / 0.7).softmax(-1).numpy()
    params = Sampling(temperature=0.7, seed=11)
    tokens = sample(logits.expand(count, -1), [params] * count, range(count))
    found = np.bincount(tokens, minlength=6) / count
    assert found[4] == 0
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(expected * (1 - expected) / count).max())


@pytest.mark.parametrize("by", ["seed", "position"])
def test_uniform_is_uniform_and_uncorrelated(by: str) -> None:
    draws = np.array([uniform(i, 5) if by == "seed" else uniform(5, i) for i in range(20_000)])
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared with 19 degrees of freedom: 50 is p = 1e-4
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_stays_the_same_for_ever() -> None:
    """Workers of two versions take over from each other: these numbers are part of the protocol."""
    assert uniform(0, 0) == 0.36461468368691563
    assert uniform((1 << 64) - 1, 12345) == 0.6315815517814941
    logits = torch.linspace(-3, 3, 50).repeat(8, 1)
    assert sample(logits, [Sampling(seed=7)] * 8, range(8)) == [47, 32, 47, 48, 49, 44, 43, 41]


def test_rounding_that_reorders_equals_changes_nothing() -> None:
    """Another batch or worker rounds otherwise: nearly equal tokens then change their order by weight."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, 400), generator=generator).round(decimals=1)  # many equal ones
    noise = (torch.rand((1, 400), generator=generator) - 0.5) * 1e-6
    assert (logits.argsort() != (logits + noise).argsort()).sum() > 100
    params = [Sampling(temperature=2.0, seed=3), Sampling(temperature=2.0, seed=3, min_p=0.01)]
    for position in range(500):
        for of_row in params:
            assert sample(logits + noise, [of_row], [position]) == sample(logits, [of_row], [position])


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert sample(logits, [Sampling(temperature=0.0)] * 2, [0, 0]) == [1, 0]


def test_half_precision_logits() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]], dtype=torch.bfloat16)
    assert sample(logits, [Sampling(temperature=0.01)], [0]) == [1]
