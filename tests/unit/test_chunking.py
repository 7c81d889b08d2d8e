"""Sharing a step out among prompts: nothing is wasted, the first always advances, a short one does not wait."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.chunking import rank, share


@dataclass(eq=False)
class Prompt:
    left: int
    number: int = 0
    priority: int = 0


def of(*lefts: int) -> list[Prompt]:
    return [Prompt(left, number) for number, left in enumerate(lefts)]


PROMPTS = st.lists(st.tuples(st.integers(1, 5000), st.integers(-1, 1)), max_size=12).map(
    lambda each: [Prompt(left, number, priority) for number, (left, priority) in enumerate(each)]
)


@given(PROMPTS, st.integers(1, 600))
def test_no_token_is_wasted_and_the_first_advances(prompts: list[Prompt], budget: int) -> None:
    shares = share(prompts, budget)
    assert all(0 < tokens <= prompt.left for prompt, tokens in shares.items())
    assert sum(shares.values()) == min(budget, sum(prompt.left for prompt in prompts))
    if prompts:
        head = min(prompts, key=rank)
        assert shares[head] >= min(head.left, budget / 2)


@given(PROMPTS, st.integers(1, 600), st.sets(st.integers(0, 11)))
def test_who_may_not_take_is_passed_over(prompts: list[Prompt], budget: int, barred: set[int]) -> None:
    shares = share(prompts, budget, lambda prompt: prompt.number not in barred)
    others = [prompt for prompt in prompts if prompt.number not in barred]
    assert set(shares) <= set(others)
    assert sum(shares.values()) == min(budget, sum(prompt.left for prompt in others))


@given(PROMPTS, st.integers(1, 600))
def test_a_higher_priority_is_never_held_up_by_a_lower_one(prompts: list[Prompt], budget: int) -> None:
    shares = share(prompts, budget)
    for prompt in prompts:
        if shares.get(prompt, 0) < prompt.left:
            assert all(prompt.priority <= other.priority for other in shares)


def test_a_short_prompt_behind_a_long_one() -> None:
    long, short, longer = of(4000, 100, 5000)
    assert share([long, short, longer], 256) == {long: 156, short: 100}


def test_prompts_of_one_length_come_one_after_another() -> None:
    first, second = of(300, 300)
    assert share([first, second], 256) == {first: 256}


def test_what_the_first_leaves_goes_on() -> None:
    first, second, third = of(100, 200, 300)
    assert share([first, second, third], 256) == {first: 100, second: 156}


def test_nobody() -> None:
    assert share([], 256) == {}
