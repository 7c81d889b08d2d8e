"""Throughput: one strange step changes little, small steps and old ones say nothing."""

import pytest

from zipserve.prefill.throughput import Throughput


def test_it_follows_slowly() -> None:
    throughput = Throughput(256)
    assert throughput.seconds_at_least(1000, 0.0) == 0.0
    throughput.note(256, 0.256, 0.0)
    assert throughput.seconds_at_least(1000, 0.0) == pytest.approx(0.5)
    for _ in range(50):
        throughput.note(256, 0.512, 0.0)
    assert throughput.seconds_at_least(1000, 0.0) == pytest.approx(1.0, rel=0.01)


def test_a_stall_counts_little() -> None:
    throughput = Throughput(256)
    throughput.note(256, 0.256, 0.0)
    throughput.note(256, 100.0, 0.0)
    assert throughput.seconds_at_least(1000, 0.0) < 0.6


@pytest.mark.parametrize(("tokens", "seconds"), [(127, 10.0), (256, 0.0)])
def test_what_is_no_measure(tokens: int, seconds: float) -> None:
    throughput = Throughput(256)
    throughput.note(tokens, seconds, 0.0)
    assert throughput.seconds_at_least(1000, 0.0) == 0.0


def test_an_old_estimate_is_none() -> None:
    throughput = Throughput(256)
    throughput.note(256, 10.0, 0.0)
    assert throughput.seconds_at_least(1000, 29.0) > 0
    assert throughput.seconds_at_least(1000, 30.0) == 0.0
    throughput.note(256, 0.256, 31.0)
    assert throughput.seconds_at_least(1000, 31.0) == pytest.approx(0.5), "it starts anew"
