"""Counts of what is there at the moment, by key."""

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


@contextmanager
def counted(counter: Counter[K], key: K, amount: int = 1) -> Iterator[None]:
    """Counts something while the context is open. Keys of which nothing is there leave the counter."""
    counter[key] += amount
    try:
        yield
    finally:
        counter[key] -= amount
        if not counter[key]:
            del counter[key]
