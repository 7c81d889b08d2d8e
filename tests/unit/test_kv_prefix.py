"""Chained hashes: the name of a block depends on every token up to its end, and on nothing else."""

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from zipserve.common.kv.prefix import HASH_BYTES, prefix_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(TOKENS, st.binary(max_size=40))
def test_is_the_chain_that_the_docstring_says(token_ids: list[int], salt: bytes) -> None:
    parent, expected = hashlib.sha256(salt).digest(), []
    for start in range(0, len(token_ids), 16):
        part = token_ids[start : start + 16]
        parent = hashlib.sha256(parent + b"".join(struct.pack("<I", token) for token in part)).digest()
        expected.append(parent)
    assert prefix_hashes(token_ids, 16, salt) == expected
    assert all(len(name) == HASH_BYTES for name in expected)


@given(TOKENS.filter(bool), st.data())
def test_a_changed_token_renames_its_block_and_all_behind(token_ids: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(token_ids) - 1))
    changed = [*token_ids]
    changed[index] = (changed[index] + data.draw(st.integers(1, 2**32 - 1))) % 2**32
    before, after = prefix_hashes(token_ids, 16, b"s"), prefix_hashes(changed, 16, b"s")
    assert before[: index // 16] == after[: index // 16]
    assert all(a != b for a, b in zip(before[index // 16 :], after[index // 16 :], strict=True))


@given(TOKENS, TOKENS)
def test_full_blocks_keep_their_names_when_the_sequence_grows(token_ids: list[int], more: list[int]) -> None:
    full = len(token_ids) // 16
    assert prefix_hashes(token_ids + more, 16, b"s")[:full] == prefix_hashes(token_ids, 16, b"s")[:full]


@given(TOKENS.filter(bool), st.binary(max_size=40), st.binary(max_size=40))
def test_salts_never_share_a_name(token_ids: list[int], one: bytes, other: bytes) -> None:
    names, others = prefix_hashes(token_ids, 16, one), prefix_hashes(token_ids, 16, other)
    assert (names == others) is (one == other)
    assert one == other or set(names).isdisjoint(others)


def test_no_two_prefixes_share_a_name() -> None:
    """A shorter rest is not the full block, nor is the same block at another position."""
    names = [name for tokens in range(1, 50) for name in prefix_hashes([7] * tokens, 16, b"s")[-1:]]
    assert len(set(names)) == len(names)
