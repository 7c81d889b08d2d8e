"""Admission: the bounds hold whatever the order, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.errors import InvalidRequestError, OverloadedError
from zipserve.router.admission import Admission, Ticket
from zipserve.router.caller import ANYBODY, Caller


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


def test_a_caller_has_a_limit_of_its_own() -> None:
    admission = Admission(requests_max=10, tokens_max=100)
    caller = Caller("team-a", requests_max=2)
    first = admission.enter(0.0, caller)
    admission.enter(0.0, caller)
    with pytest.raises(OverloadedError, match="2 requests of key 'team-a' are in flight, 2 is its limit"):
        admission.enter(0.0, caller)
    admission.enter(0.0, Caller("team-b", requests_max=1))
    admission.enter(0.0)
    admission.leave(first, 0.0)
    admission.enter(0.0, caller)
    assert admission.requests == 4


def test_when_a_caller_may_come_back_follows_its_own_requests() -> None:
    admission = Admission(requests_max=100, tokens_max=100)
    caller = Caller("team-a", requests_max=1)
    for at_s in (0.0, 1.0, 8.0):
        for who in (caller, *[ANYBODY] * 10):
            ticket = admission.enter(at_s, who)
            admission.reserve(ticket, 1, at_s)
            admission.leave(ticket, at_s)
    admission.enter(9.0, caller)
    with pytest.raises(OverloadedError) as caught:
        admission.enter(9.0, caller)
    assert caught.value.retry_after_s == pytest.approx(9.0 / 3)


@given(*[st.text("0:a", max_size=4)] * 4)
def test_salts_of_different_callers_never_meet(one: str, of_one: str, other: str, of_other: str) -> None:
    same = Caller(cache_salt=one).salt(of_one) == Caller(cache_salt=other).salt(of_other)
    assert same == ((one, of_one) == (other, of_other))


def test_a_priority_is_capped() -> None:
    assert [Caller(priority_max=3).priority(asked) for asked in (-1, 3, 4)] == [-1, 3, 3]
    assert ANYBODY.priority(1 << 30) == 1 << 30
    assert ANYBODY.salt("") == ""
