"""What a router remembers of the prefixes that it has sent: per life of a worker, layout and salt, and not too much."""

from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.kv.holders import Holders
from zipserve.common.kv.prefix import chain_salt, prefix_hashes
from zipserve.router.policy import Worker
from zipserve.router.prefixes import Prefixes

BLOCK = 16


def worker(name: str, incarnation: int = 1, layout: bytes = b"A", block_tokens: int = BLOCK) -> Worker:
    return Worker(name, incarnation, f"{name}:1", "m", "r1", 1000, writable_layout=layout, block_tokens=block_tokens)


P1, P2 = worker("p1"), worker("p2")


def remembering(names_max: int) -> Prefixes:
    """Without a directory."""
    return Prefixes(names_max, Holders(), 0.0)


def left(prefixes: Prefixes, token_ids: list[int], *workers: Worker, salt: str = "") -> list[int]:
    found = prefixes.to_compute(workers, token_ids, salt)
    return [found[w.key] for w in workers]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.lists(st.integers(0, 3), min_size=1, max_size=80))
def test_full_blocks_that_are_the_same_from_the_start_are_saved(sent: list[int], asked: list[int]) -> None:
    prefixes = remembering(1000)
    prefixes.note(P1, sent, "")
    same = next((i for i, (a, b) in enumerate(zip(sent, asked, strict=False)) if a != b), min(len(sent), len(asked)))
    saved = min(same, len(asked) - 1) // BLOCK * BLOCK
    assert left(prefixes, asked, P1, P2) == [len(asked) - saved, len(asked)]


def test_every_worker_that_was_sent_a_prefix_counts() -> None:
    prefixes = remembering(1000)
    prefixes.note(P1, list(range(50)), "")
    prefixes.note(P2, list(range(20)), "")
    assert left(prefixes, list(range(50)), P1, P2) == [2, 34]


def test_another_life_layout_or_salt_has_nothing() -> None:
    prefixes, token_ids = remembering(1000), list(range(40))
    prefixes.note(P1, token_ids, "a")
    assert left(prefixes, token_ids, P1, salt="a") == [8]
    assert left(prefixes, token_ids, worker("p1", incarnation=2), worker("p1", layout=b"B"), salt="a") == [40, 40]
    assert left(prefixes, token_ids, P1, salt="b") == left(prefixes, token_ids, P1) == [40]


def test_a_worker_without_blocks_is_left_alone() -> None:
    prefixes, unknown = remembering(1000), worker("p1", block_tokens=0)
    prefixes.note(unknown, list(range(40)), "")
    assert (len(prefixes), left(prefixes, list(range(40)), unknown)) == (0, [40])


def test_the_bound() -> None:
    prefixes = remembering(3)
    for start in (0, 100):
        prefixes.note(P1, list(range(start, start + 2 * BLOCK + 1)), "")
    assert len(prefixes) == 3
    assert left(prefixes, list(range(100, 140)), P1) == [8]
    assert left(prefixes, list(range(40)), P1) == [24], "the end of the older one went first"
    prefixes.note(P1, list(range(1000)), "")
    assert len(prefixes) == 3
    nothing = remembering(0)
    nothing.note(P1, list(range(40)), "")
    assert left(nothing, list(range(40)), P1) == [40]


def test_holders_of_a_block_are_bounded() -> None:
    prefixes, workers = remembering(1000), [worker(f"p{i}") for i in range(20)]
    for one in workers:
        prefixes.note(one, list(range(BLOCK)), "")
    assert left(prefixes, list(range(BLOCK + 1)), *workers) == [BLOCK + 1] * 12 + [1] * 8


def test_the_directory_counts_and_what_others_hold_costs_little() -> None:
    holders, token_ids = Holders(), list(range(5 * BLOCK))
    prefixes = Prefixes(1000, holders, fetch_cost=0.25)
    names = prefix_hashes(token_ids, BLOCK, chain_salt(b"A", ""))
    holders.add(P1.key, b"", names[:1])
    holders.add(("kvstore", 7), b"", names[:3])
    assert left(prefixes, token_ids, P1, P2) == [4 * BLOCK - 24, 5 * BLOCK - 36]
    prefixes.note(P2, token_ids[: 4 * BLOCK], "")
    assert left(prefixes, token_ids, P1, P2) == [4 * BLOCK - 24, BLOCK], "it is being computed there"
    assert left(prefixes, token_ids, P1, salt="t") == [5 * BLOCK], "another tenant's"
    holders.drop(("kvstore", 7))
    assert left(prefixes, token_ids, P1) == [4 * BLOCK]
