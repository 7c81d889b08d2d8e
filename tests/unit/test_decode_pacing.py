"""Pacing: prompts take what the sequences that decode can spare, no more, and always something."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.decode.pacing import CHUNK_TOKENS_MIN, Pacing

Machine = Callable[[int, int], float]
"""Seconds of a step of so many rows and prompt tokens."""


def machine(read_s: float = 0.02, row_s: float = 0.001, chunk_s: float = 0.002, token_s: float = 0.0005) -> Machine:
    """One whose steps read the weights once, and whose chunks have a fixed cost."""
    return lambda rows, tokens: (read_s + rows * row_s) * (rows > 0) + (chunk_s + tokens * token_s) * (tokens > 0)


def run(pacing: Pacing, of: Machine, rows: int, steps: int) -> list[int]:
    """Runs steps with a prompt that never ends; returns their tokens."""
    chunks = []
    for _ in range(steps):
        chunks.append(pacing.chunk_tokens(rows))
        pacing.note(rows, chunks[-1], of(rows, chunks[-1]))
    return chunks


@given(
    st.floats(0.005, 0.1), st.floats(0.0, 0.005), st.floats(0.0, 0.004), st.floats(1e-4, 2e-3),
    st.integers(1, 32), st.floats(1.5, 4.0),
)  # fmt: skip
def test_a_step_takes_what_is_allowed(
    read_s: float, row_s: float, chunk_s: float, token_s: float, rows: int, slowdown_max: float
) -> None:
    of = machine(read_s, row_s, chunk_s, token_s)
    pacing = Pacing(512, slowdown_max)
    run(pacing, of, rows, 200)
    tokens = pacing.chunk_tokens(rows)
    decode_s = of(rows, 0)
    allowed_s = (slowdown_max - 1) * decode_s
    assert tokens == CHUNK_TOKENS_MIN or of(rows, tokens) <= 1.05 * (decode_s + allowed_s)
    # and nothing is given away: a longer chunk, at as much a token as this one takes, would be too much
    longer_s = (of(rows, tokens) - decode_s) / tokens * (tokens + CHUNK_TOKENS_MIN)
    assert tokens == 512 or longer_s >= 0.95 * allowed_s


def test_no_step_on_the_way_is_much_too_long() -> None:
    of, pacing = machine(), Pacing(512, 2.0)
    chunks = run(pacing, of, 8, 50)
    assert max(of(8, tokens) for tokens in chunks) <= 2.05 * of(8, 0)
    assert chunks[:2] == [0, CHUNK_TOKENS_MIN]
    assert chunks[-1] == 48


def test_noise_and_stalls_do_not_mislead_it() -> None:
    dice, of, pacing = random.Random(3), machine(), Pacing(512, 2.0)

    def noisy(rows: int, tokens: int) -> float:
        return of(rows, tokens) * dice.uniform(0.8, 1.2) * (100.0 if dice.random() < 0.02 else 1.0)

    slow = [tokens for tokens in run(pacing, noisy, 8, 2000) if of(8, tokens) > 2.5 * of(8, 0)]
    assert len(slow) < 2000 * 0.05
    assert run(pacing, of, 8, 50)[-1] == pytest.approx(48, abs=16)


def test_a_chunk_is_not_priced_by_its_fixed_cost() -> None:
    """As on a small machine, where 4 tokens beside a batch take 37 ms and 32 take 143."""
    of = machine(read_s=0.05, row_s=0.0, chunk_s=0.022, token_s=0.0038)
    pacing = Pacing(256, 1.5, free_s=0.19)
    chunks = run(pacing, of, 2, 40)
    assert chunks[-1] == 28
    assert of(2, 28) <= 0.19 < of(2, 32)
    assert max(of(2, tokens) for tokens in chunks) < 0.2


def test_contexts_that_grow_are_seen() -> None:
    pacing, grown = Pacing(512, 2.0), machine(read_s=0.06)
    run(pacing, machine(), 8, 50)
    chunks = run(pacing, grown, 8, 600)
    assert chunks.count(0) == 9
    assert 1.8 * grown(8, 0) < grown(8, chunks[-1]) <= 2.0 * grown(8, 0)


@given(st.floats(0.01, 0.2), st.floats(0.0, 0.5))
def test_what_is_free_is_taken(read_s: float, free_s: float) -> None:
    of, pacing = machine(read_s=read_s), Pacing(10_000, 1.5, free_s)
    run(pacing, of, 4, 63)
    tokens = pacing.chunk_tokens(4)
    allowed_s = max(1.5 * of(4, 0), free_s)
    assert tokens == CHUNK_TOKENS_MIN or of(4, tokens) <= 1.02 * allowed_s
    assert of(4, tokens + 2 * CHUNK_TOKENS_MIN) >= 0.98 * allowed_s


def test_nothing_decodes() -> None:
    assert Pacing(256, 2.0).chunk_tokens(0) == 256


def test_an_unknown_number_of_rows_is_seen_alone_once() -> None:
    pacing = Pacing(256, 2.0)
    assert [tokens > 0 for tokens in run(pacing, machine(), 1, 3)] == [False, True, True]
    assert [tokens > 0 for tokens in run(pacing, machine(), 4, 3)] == [False, True, True]
    assert [tokens > 0 for tokens in run(pacing, machine(), 5, 3)] == [True, True, True], "as many as 4, nearly"


def test_a_prompt_always_advances() -> None:
    of = machine(token_s=1.0)
    assert run(Pacing(512, 2.0), of, 2, 30)[1:] == [CHUNK_TOKENS_MIN] * 29


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 600), st.floats(0.0, 1e3)), max_size=60), st.integers(0, 40)
)
def test_any_measurements(notes: list[tuple[int, int, float]], rows: int) -> None:
    pacing = Pacing(100, 2.0)
    for note in notes:
        pacing.note(*note)
    assert pacing.chunk_tokens(rows) in {0, 100, *range(CHUNK_TOKENS_MIN, 97, CHUNK_TOKENS_MIN)}
    pacing.note(rows, 0, 0.01)
    assert pacing.chunk_tokens(rows) >= CHUNK_TOKENS_MIN
