"""Block hashes: chained over the prefix, keyed by model and block size, begun by a salt."""

from __future__ import annotations

import pytest

from bascule.kv.hashing import HASH_BYTES, BlockHasher, salt_of

TOKENS = list(range(100, 112))


def test_only_full_blocks_have_a_hash_of_16_bytes() -> None:
    hasher = BlockHasher("model", 4)
    assert [len(hasher.chain(TOKENS[:count])) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert {len(name) for name in hasher.chain(TOKENS)} == {16}


def test_a_chain_continues_where_it_was_left() -> None:
    hasher = BlockHasher("model", 4)
    whole = hasher.chain(TOKENS)
    assert whole[:1] + hasher.chain(TOKENS[4:], behind=whole[0]) == whole


def test_a_hash_depends_on_everything_before_it() -> None:
    hasher = BlockHasher("model", 4)
    one, other = hasher.chain(TOKENS), hasher.chain([1, *TOKENS[1:]])
    assert not set(one) & set(other)
    assert hasher.chain([5, 6, 7, 8, 5, 6, 7, 8])[0] != hasher.chain([5, 6, 7, 8, 5, 6, 7, 8])[1]


def test_models_salts_and_block_sizes_share_no_hash() -> None:
    hashers = [BlockHasher("model", 4), BlockHasher("model2", 4), BlockHasher("model", 2)]
    salts = [b"", salt_of("one"), salt_of("two")]
    names = [name for hasher in hashers for salt in salts for name in hasher.chain(TOKENS, salt)]
    assert len(set(names)) == len(names)


def test_a_salted_chain_continues_where_it_was_left() -> None:
    hasher, salt = BlockHasher("model", 4), salt_of("one")
    whole = hasher.chain(TOKENS, salt)
    assert whole[:2] + hasher.chain(TOKENS[8:], whole[1]) == whole


def test_a_salt_does_not_show_its_secret_and_is_no_hash() -> None:
    salt = salt_of("secret")
    assert salt == salt_of("secret") != salt_of("secret2")
    assert b"secret" not in salt and len(salt) == 2 * HASH_BYTES
    assert salt_of("") == b""


def test_a_sequence_of_any_kind_hashes_alike() -> None:
    hasher = BlockHasher("model", 4)
    assert hasher.chain(tuple(TOKENS)) == hasher.chain(TOKENS) == BlockHasher("model", 4).chain(range(100, 112))


def test_a_block_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockHasher("model", 0)
