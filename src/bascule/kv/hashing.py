"""Names for blocks of tokens: keyed hashes chained over the prefix."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import cast

from blake3 import blake3

from bascule.types import BlockHash, Salt

HASH_BYTES = 16


class BlockHasher:
    """Hashes full blocks of `block_size` tokens under a key made of the model's fingerprint.

    Equal hashes mean equal tokens from position 0 on, for the same model, salt and block size; blocks of different
    keys or salts never meet.
    """

    def __init__(self, fingerprint: str, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"a block holds at least one token, not {block_size}")
        self.block_size = block_size
        parts = (fingerprint.encode(), b"", str(block_size).encode())
        material = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        self._key = blake3(material, derive_key_context="bascule 1 block hash key").digest()

    def chain(self, tokens: Sequence[int], behind: BlockHash | Salt = b"") -> list[BlockHash]:
        """The hashes (16 bytes each) of the full blocks of `tokens`, which follow the block hashed as `behind`; those
        that begin a text are behind its salt, which is longer than a hash and so never taken for one.

        A last block that is not full has no hash. Token ids are 0 to 2**32 - 1.
        """
        full = len(tokens) // self.block_size
        data = _little_endian(tokens[: full * self.block_size])
        width = 4 * self.block_size
        link, key = bytes(behind), self._key
        hashes = [
            link := blake3(link + data[start : start + width], key=key).digest(HASH_BYTES)
            for start in range(0, len(data), width)
        ]
        return cast(list[BlockHash], hashes)


def salt_of(secret: str) -> Salt:
    """The salt of whoever knows `secret`, which does not follow from it; none for an empty one."""
    return (
        blake3(secret.encode(errors="surrogateescape"), derive_key_context="bascule 1 cache salt").digest()
        if secret
        else b""
    )


def _little_endian(tokens: Sequence[int]) -> bytes:
    """Four bytes a token; raises OverflowError for one that has no room in them."""
    numbers = array("I", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


class BlockDigest:
    """Stands for a set of blocks, whatever their order: equal for equal sets, and for hardly any others."""

    def __init__(self) -> None:
        self._number = 0

    def toggle(self, names: Iterable[BlockHash]) -> None:
        """Put each of `names` into the set, or take it out if it is there."""
        for name in names:
            self._number ^= int.from_bytes(name, "little")

    @property
    def value(self) -> bytes:
        return self._number.to_bytes(HASH_BYTES, "little")
