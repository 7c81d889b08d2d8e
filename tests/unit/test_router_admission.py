"""Admission: the bounds hold whatever the order, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.router.admission import Admission, Ticket


@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_bounds_hold_and_everything_comes_back(requests_max: int, tokens_max: int, data: st.DataObject) -> None:
    admission = Admission(requests_max, tokens_max)
    inside: list[Ticket] = []
    refusals: list[tuple[bool, float]] = []
    now_s = 0.0
    for _ in range(data.draw(st.integers(0, 30))):
        now_s += data.draw(st.sampled_from([0.0, 0.5, 3.0]))
        leaving = data.draw(st.integers(-3, len(inside) - 1))
        if leaving >= 0:
            admission.leave(inside.pop(leaving), now_s)
        else:
            tokens = data.draw(st.integers(1, 20))
            try:
                inside.append(ticket := admission.enter(now_s))
                admission.reserve(ticket, tokens, now_s)
            except OverloadedError as error:
                full = admission.requests == requests_max or admission.tokens + tokens > tokens_max
                refusals.append((full, error.retry_after_s))
            except InvalidRequestError:
                assert tokens > tokens_max
        assert admission.requests == len(inside) <= requests_max
        assert admission.tokens == sum(ticket.tokens for ticket in inside) <= tokens_max
    assert all(full and 0.1 <= retry_after_s <= 60.0 for full, retry_after_s in refusals)
    for ticket in inside:
        admission.leave(ticket, now_s)
    assert (admission.requests, admission.tokens) == (0, 0)


def test_errors_name_limit_and_value() -> None:
    admission = Admission(requests_max=2, tokens_max=100)
    ticket = admission.enter(0.0)
    with pytest.raises(InvalidRequestError, match="are 101 tokens, this router admits at most 100"):
        admission.reserve(ticket, 101, 0.0)
    admission.reserve(ticket, 60, 0.0)
    second = admission.enter(0.0)
    with pytest.raises(OverloadedError, match="needs 41 tokens, 60 of 100 are in flight"):
        admission.reserve(second, 41, 0.0)
    with pytest.raises(OverloadedError, match="2 requests are in flight, 2 is the limit"):
        admission.enter(0.0)


def test_retry_follows_the_drain_rate() -> None:
    admission = Admission(requests_max=10, tokens_max=100)
    for at_s in (0.0, 1.0, 2.0):
        ticket = admission.enter(at_s)
        admission.reserve(ticket, 10, at_s)
        admission.leave(ticket, at_s)
    full = admission.enter(2.0)
    admission.reserve(full, 100, 2.0)
    late = admission.enter(2.0)
    with pytest.raises(OverloadedError) as caught:
        admission.reserve(late, 60, 2.0)
    assert caught.value.retry_after_s == pytest.approx(60 / 15)  # 30 tokens left within 2 s


def test_retry_is_a_guess_without_history() -> None:
    admission = Admission(requests_max=1, tokens_max=100)
    admission.enter(0.0)
    with pytest.raises(OverloadedError) as caught:
        admission.enter(5.0)
    assert caught.value.retry_after_s == 1.0
