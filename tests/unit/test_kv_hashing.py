"""Block hashes: chained over the prefix, keyed by model, tenant and block size."""

from __future__ import annotations

import pytest

from bascule.kv.hashing import BlockHasher

TOKENS = list(range(100, 112))


def test_only_full_blocks_have_a_hash_of_16_bytes() -> None:
    hasher = BlockHasher("model", 4)
    assert [len(hasher.chain(TOKENS[:count])) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert {len(name) for name in hasher.chain(TOKENS)} == {16}


def test_a_chain_continues_where_it_was_left() -> None:
    hasher = BlockHasher("model", 4)
    whole = hasher.chain(TOKENS)
    assert whole[:1] + hasher.chain(TOKENS[4:], previous=whole[0]) == whole


def test_a_hash_depends_on_everything_before_it() -> None:
    hasher = BlockHasher("model", 4)
    one, other = hasher.chain(TOKENS), hasher.chain([1, *TOKENS[1:]])
    assert not set(one) & set(other)
    assert hasher.chain([5, 6, 7, 8, 5, 6, 7, 8])[0] != hasher.chain([5, 6, 7, 8, 5, 6, 7, 8])[1]


def test_models_tenants_and_block_sizes_share_no_hash() -> None:
    hashers = [
        BlockHasher("model", 4),
        BlockHasher("model2", 4),
        BlockHasher("model", 4, b"2"),
        BlockHasher("model", 2),
        BlockHasher("model", 4, b"salt"),
    ]
    names = [name for hasher in hashers for name in hasher.chain(TOKENS)]
    assert len(set(names)) == len(names)


def test_a_sequence_of_any_kind_hashes_alike() -> None:
    hasher = BlockHasher("model", 4)
    assert hasher.chain(tuple(TOKENS)) == hasher.chain(TOKENS) == BlockHasher("model", 4).chain(range(100, 112))


def test_a_block_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockHasher("model", 0)
