"""The log of a worker's steps."""

import timeit

from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.steps import Step, StepLog, pairs_of

KEPT = 16


def step(number: int) -> Step:
    return Step(number, 0, 0, 0, 0.001)


@given(before=st.integers(0, 50), chunks=st.lists(st.integers(1, 40), max_size=6))
def test_pairs_are_those_of_a_causal_mask(before: int, chunks: list[int]) -> None:
    counted = 0
    for tokens in chunks:
        assert pairs_of(before, tokens) == sum(before + i + 1 for i in range(tokens))
        counted += pairs_of(before, tokens)
        before += tokens
    assert counted == pairs_of(before - sum(chunks), sum(chunks)), "cutting a prompt changes nothing"


@given(noted=st.integers(0, 3 * KEPT), after=st.integers(0, 3 * KEPT), steps_max=st.integers(0, 2 * KEPT))
def test_steps_come_in_order_and_what_is_lost_is_told(noted: int, after: int, steps_max: int) -> None:
    log = StepLog(KEPT)
    for number in range(1, noted + 1):
        log.note(step(number))
    after = min(after, noted)
    steps, last, lost = log.after(after, steps_max)
    expected = range(max(after, noted - KEPT) + 1, noted + 1)[:steps_max]
    assert [step.prompt_tokens for step in steps] == list(expected)
    assert lost == max(0, noted - KEPT - after)
    assert last == after + lost + len(steps)


@given(st.lists(st.integers(1, KEPT), max_size=20))
def test_a_reader_that_keeps_up_sees_every_step_once(bursts: list[int]) -> None:
    log, seen, last = StepLog(KEPT), list[int](), 0
    for burst in bursts:
        for _ in range(burst):
            log.note(step(log.last + 1))
        while (answer := log.after(last, 5))[0]:
            assert answer[2] == 0
            seen += [step.prompt_tokens for step in answer[0]]
            last = answer[1]
    assert seen == list(range(1, log.last + 1))


def test_a_step_costs_microseconds() -> None:
    log = StepLog()
    seconds = min(timeit.repeat(lambda: log.note(Step(1, 2, 3, 4, 0.5)), number=1_000, repeat=5)) / 1_000
    assert seconds < 20e-6
