"""Names for blocks of tokens: keyed hashes chained over the prefix."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import cast

from blake3 import blake3

from bascule.types import BlockHash

HASH_BYTES = 16


class BlockHasher:
    """Hashes full blocks of `block_size` tokens under a key made of the model's fingerprint and a tenant's salt.

    Equal hashes mean equal tokens from position 0 on, for the same model, tenant and block size; blocks of different
    keys never meet.
    """

    def __init__(self, fingerprint: str, block_size: int, salt: bytes = b"") -> None:
        if block_size < 1:
            raise ValueError(f"a block holds at least one token, not {block_size}")
        self.block_size = block_size
        parts = (fingerprint.encode(), salt, str(block_size).encode())
        material = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        self._key = blake3(material, derive_key_context="bascule 1 block hash key").digest()

    def chain(self, tokens: Sequence[int], previous: BlockHash | None = None) -> list[BlockHash]:
        """The hashes (16 bytes each) of the full blocks of `tokens`, which follow the block hashed as `previous`.

        A last block that is not full has no hash. Token ids are 0 to 2**32 - 1.
        """
        full = len(tokens) // self.block_size
        data = _little_endian(tokens[: full * self.block_size])
        width = 4 * self.block_size
        link, key = bytes(previous or b""), self._key
        hashes = [
            link := blake3(link + data[start : start + width], key=key).digest(HASH_BYTES)
            for start in range(0, len(data), width)
        ]
        return cast(list[BlockHash], hashes)


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
